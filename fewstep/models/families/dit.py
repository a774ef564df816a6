"""DiT: class-conditional transformers, on pixels or on the latents of its pipeline."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    output = net(x, timestep=timestep, class_labels=cond.inputs["class_labels"], return_dict=False)[0]
    # DiT may learn its variance: the first half of the channels is the prediction.
    return output[:, : x.shape[1]]


class DiT(Codec):
    """A VAE alone: what the network reads are labels."""

    NEEDS = ("vae",)
    PROMPTED = False

    def _embed(self, prompts):
        raise TypeError("a network that reads labels has no use for prompts")

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def side(self):
        return self.pipeline.transformer.config.sample_size * self._factor

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, self.pipeline.transformer.config.patch_size)

    def latent_shape(self, height, width, frames=None):
        """Of images of the one size that the network makes: its pipeline cannot be asked for another."""
        made = self.side
        if frames is not None or (height, width) != (made, made):
            raise UserError(f"this model makes images of {made}x{made}: set data.resolution={made} and no data.frames")
        return self.vae.config.latent_channels, *self._grid(height, width, self._factor, 1)


ROWS = {
    "DiTTransformer2DModel": Family(
        call=_call,
        tap=middle("transformer_blocks"),
        time_embedding="transformer_blocks.0.norm1.emb",
        blocks=("BasicTransformerBlock",),
        processors=("AttnProcessor2_0",),
        classes=lambda net: net.config.num_embeds_ada_norm + 1,
    )
}
CODECS = {"DiTPipeline": DiT}
