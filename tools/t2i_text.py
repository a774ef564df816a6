"""Make the tokenizer and train the text encoder of the text-to-image teacher: a few minutes on one core.

python tools/t2i_text.py [--steps 800] [--out runs/t2i]

The encoder learns to tell from its token states what a caption says: after the end of the sentence everything, at the
noun of an object what was said of that object. A run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from resumable import fit
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.core.draw import Draw
from fewstep.data.captioned import ATTRIBUTES, RELATIONS, UNSAID, CaptionedScenes, canonical

LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH, LAYERS, HEADS = 128, 3, 4
BATCH = 128
RATE = 1e-3
EMPTY = 0.1
TO_THE = 0.25
TRAINING_SEED, HELD_OUT_SEED = 13, 90_013
HELD_OUT = 4000
_FILLERS = ("a", "an", "the", "one", "to", "on")
_FIRST, _SECOND = slice(2, 5), slice(5, 8)  # the columns of kind, colour and size


def words() -> list[str]:
    """Every word that captions or their reader know."""
    known = [word for values in ATTRIBUTES.values() for value in values for word in value.split()]
    return sorted({*known, *_FILLERS, *" ".join(RELATIONS).split()})


def make_tokenizer() -> CLIPTokenizer:
    """One token for each word of a caption; other words fall into smaller pieces, so that any prompt is read."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    # every word twice, since the trainer only merges pairs it sees more than once
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(words() * 2, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*bytes_, *(byte + "</w>" for byte in bytes_), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=END, model_max_length=LENGTH)


def new_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return CLIPTextModel(config)


def prompts(seed: int, ids: Tensor) -> tuple[list[str], Tensor]:
    """Captions and the rows (B,K) that they say; a tenth is empty and says nothing."""
    scenes, draw = CaptionedScenes(64, seed), Draw(seed, 0, ids)
    rows, texts = scenes.said(ids), scenes.captions(ids)
    empty, long = (draw.uniform(f"text.{what}") < share for what, share in (("empty", EMPTY), ("long", TO_THE)))
    rows[empty] = UNSAID
    for index in long.nonzero()[:, 0].tolist():
        texts[index] = texts[index].replace("left of", "to the left of").replace("right of", "to the right of")
    return ["" if nothing else text for text, nothing in zip(texts, empty.tolist(), strict=True)], rows


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token numbers (B,16), as a pipeline makes them."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


class Probe(nn.Module):
    """Linear readings of token states: everything where the sentence has ended, one object at its noun.

    Class 0 of every attribute is `unsaid`.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.end = tokenizer.eos_token_id
        self.nouns = torch.tensor(tokenizer.convert_tokens_to_ids([f"{kind}</w>" for kind in ATTRIBUTES["kind"]]))
        self.widths = [len(values) + 1 for values in ATTRIBUTES.values()]
        self.whole = nn.Linear(WIDTH, sum(self.widths))
        self.object = nn.Linear(WIDTH, sum(self.widths[_FIRST]))

    def forward(self, states: Tensor, tokens: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of logits (M,classes) and classes (M,), for states (B,16,128), tokens (B,16) and said rows (B,K)."""
        ended = tokens == self.end
        seen = (canonical(rows) + 1)[:, None].expand(-1, LENGTH, -1)[ended]
        pairs = list(zip(self.whole(states[ended]).split(self.widths, 1), seen.unbind(1), strict=True))
        at_noun = torch.isin(tokens, self.nouns)
        objects = torch.stack([rows[:, _FIRST] + 1, rows[:, _SECOND].clamp(min=0)], 1)
        # the first noun of a sentence is object 0, the second is object 1
        named = objects[at_noun.nonzero()[:, 0], (at_noun.cumsum(1) - 1)[at_noun]]
        logits = self.object(states[at_noun]).split(self.widths[_FIRST], 1)
        return pairs + list(zip(logits, named.unbind(1), strict=True))


def train(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, seed: int, steps: int, state: Path) -> Probe:
    """Changes `encoder` in place and returns the probe it was trained with."""
    probe = Probe(tokenizer)

    def loss(step: int) -> Tensor:
        texts, rows = prompts(seed, torch.arange(step * BATCH, (step + 1) * BATCH))
        tokens = tokenise(tokenizer, texts)
        pairs = probe(encoder(tokens).last_hidden_state, tokens, rows)
        return torch.stack([F.cross_entropy(logits, classes) for logits, classes in pairs]).sum()

    fit({"encoder": encoder, "probe": probe}, loss, steps, RATE, state)
    encoder.eval()
    return probe


@torch.no_grad()
def measured(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, probe: Probe) -> dict[str, float]:
    """Accuracy of each reading on captions of another seed, over all states that it is taken from."""
    texts, rows = prompts(HELD_OUT_SEED, torch.arange(HELD_OUT))
    tokens = tokenise(tokenizer, texts)
    states = torch.cat([encoder(chunk).last_hidden_state for chunk in tokens.split(500)])
    names = [*ATTRIBUTES, *(f"{name} at its noun" for name in list(ATTRIBUTES)[_FIRST])]
    pairs = zip(names, probe(states, tokens, rows), strict=True)
    accuracy = {name: (logits.argmax(1) == classes).double().mean().item() for name, (logits, classes) in pairs}
    return accuracy | {"mean of the states": states.mean().item(), "std of the states": states.std().item()}


def write(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, probe: Probe, folder: Path, steps: int) -> None:
    """Store half-precision weights and the tokenizer, then measure what was stored."""
    encoder.half().save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    stored = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    protocol = {
        "steps": steps,
        "seed": TRAINING_SEED,
        "held_out": {"seed": HELD_OUT_SEED, "count": HELD_OUT},
        "vocabulary": len(tokenizer),
        "accuracy": measured(stored, CLIPTokenizer.from_pretrained(folder / "tokenizer"), probe),
    }
    (folder / "text_encoder" / "measured.json").write_text(json.dumps(protocol, indent=2) + "\n")
    print(json.dumps(protocol, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("runs/t2i"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    encoder = new_encoder(tokenizer, TRAINING_SEED)
    probe = train(encoder, tokenizer, TRAINING_SEED, options.steps, options.out / "text_encoder.state")
    write(encoder, tokenizer, probe, options.out, options.steps)


if __name__ == "__main__":
    main()
