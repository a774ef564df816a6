"""fewstep: turn any diffusion or flow model in diffusers format into a one- to eight-step generator."""

__version__ = "0.1.0"
