"""What each logged curve is, and how it looks in a healthy run: the text of `fewstep doctor --explain`."""

from __future__ import annotations

from fewstep.health import signs

CURVES = {
    "gap": "Rms of fake minus real score: the push on the generator. Zero at the first move, where the critic "
    "is still the teacher; up to a third of x0/std within ten moves; then it falls slowly, without ever reaching zero.",
    "lag": "E[(R - F)(F - x)] of the real and fake scores and the sample. Divided by gap^2 it says how far the critic "
    "is behind: 0 where it knows the generator, -0.2 to -0.9 where it overshoots as a quick one does; "
    f"above {signs.LAG:g} over {signs.MOVES} moves it has gone less than half of the way.",
    "generator/loss": "Of distribution matching it is the size of the push, no measure of quality: flat or slowly "
    "falling is healthy. Of regression and consistency it is a distance and falls.",
    "fake_score/loss": "Denoising of the generator's samples, and the discriminator's part: rises as samples become "
    "more varied, then stays.",
    "generator/grad_norm": "Before clipping. Within a factor of ten of its median; at players.generator.clip in most "
    "moves means that clipping sets the rate.",
    "x0/mean, x0/std": "Of the generator's samples. They walk to data/mean and data/std and stay there; one step from "
    "a teacher starts with too little deviation, since it draws averages.",
    "x0/saturated": "Share of values beyond 1 in size: near data/saturated, which is 0 for pixels. "
    f"{signs.SATURATED:.0%} more than the data's is ill: guidance or the generator's rate is too high.",
    "x0/spread": "How far samples of one batch lie apart. Rises from half of data/spread to near 1 of it; "
    f"below {signs.SPREAD:g} the samples have collapsed.",
    "x0/label": "How much of that spread the class label explains. At or above data/label, since a few-step student "
    f"draws averages of its label first; below {signs.LABEL:g} of data/label it does not listen.",
    "gan/accuracy": "0.5 to 0.8: of images that are mostly noise none can be told, so 1 is out of reach.",
    "gan/generator, gan/critic": "Near ln 2 = 0.69 and 2 ln 2 = 1.39 where neither wins. "
    f"With gan/generator above {signs.WON:g} the discriminator has won; with gan_critic_weight x gan/critic above "
    f"{signs.SWALLOWED:.0%} of fake_score/loss it is all that the critic learns.",
    "alarm": "Written by the run itself when an alarm of the progress line begins or ends: collapse, saturated.",
    "resumed": "Written when a run goes on from a checkpoint: which, and how many lines beyond it were cut.",
    "stopped": "The last line of a run that met a loss or gradient that is not finite.",
}
