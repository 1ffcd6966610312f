"""Train the paper's base model on Multi30k, English to German, and record what came out.

    python tools/translate.py DATA --out FOLDER

DATA holds the files that tfm_ref.missing_multi30k names. FOLDER gets multi30k.json (the record),
translations.txt and the checkpoints; a run that was stopped goes on from the last of these.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import sacrebleu
import torch
from torch.utils.flop_counter import FlopCounterMode

from tfm_ref import (
    Batch,
    BPETokenizer,
    EncoderDecoder,
    Pair,
    TokenBatches,
    TransformerConfig,
    average_checkpoints,
    beam_search,
    fit,
    label_smoothed_cross_entropy,
    load_checkpoint,
    multi30k,
    noam_lr,
    train_bpe,
)
from tfm_ref.bench import matmul_peak, synchronize
from tfm_ref.checkpoints import load_weights
from tfm_ref.records import new_record, save_record
from tfm_ref.training import set_seed

SPECIALS = ("<pad>", "<bos>", "<eos>")
MODULES = [
    f"tfm_ref.{name}"
    for name in (
        "attention attention_layer backends batches beams bpe cache checkpoints config embedding "
        "fused generation layers losses masks models multi_head position_embeddings positions "
        "pretokens rules schedules stack tokenizer training"
    ).split()
]


@dataclass(frozen=True)
class Settings:
    """What a run depends on; the model's sizes are those of the paper's base model."""

    d_model: int = 512
    n_heads: int = 8
    d_ff: int = 2048
    n_layers: int = 6
    dropout: float = 0.3
    n_merges: int = 8000
    max_tokens: int = 8192
    n_steps: int = 6000
    warmup: int = 1000
    every: int = 300
    n_averaged: int = 5
    n_beams: int = 4
    length_penalty: float = 0.6
    seed: int = 0
    peak_size: int = 8192


def loss(model: EncoderDecoder, batch: Batch, smoothing: float = 0.1) -> tuple[torch.Tensor, int]:
    """Give the sum of the losses of a batch, and the number of its targets."""
    logits = model(batch.source, batch.target_in, source_mask=batch.source_mask)
    return label_smoothed_cross_entropy(logits, batch.target_out, smoothing=smoothing)


def run(
    splits: Mapping[str, list[Pair]], settings: Settings, device: str, folder: Path
) -> dict[str, object]:
    """Train on "train", follow "val", translate "test"; give what is to be recorded."""
    s = settings
    texts = [text for pair in splits["train"] for text in (pair.source, pair.target)]
    tokenizer = train_bpe(texts, n_merges=s.n_merges, special_tokens=SPECIALS)
    numbers = {name.strip("<>"): tokenizer.special_tokens[name] for name in SPECIALS}
    batches = {
        name: TokenBatches(
            pairs=[(tokenizer.encode(p.source), tokenizer.encode(p.target)) for p in pairs],
            max_tokens=s.max_tokens,
            seed=s.seed,
            **numbers,
        )
        for name, pairs in splits.items()
    }
    set_seed(s.seed)
    sizes = {name: getattr(s, name) for name in ("d_model", "n_heads", "d_ff", "n_layers")}
    config = TransformerConfig(
        **sizes,
        vocab_size=tokenizer.vocab_size,
        n_encoder_layers=s.n_layers,
        dropout=s.dropout,
    )
    model = EncoderDecoder(config)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    terms = {
        "optimizer": optimizer,
        "lr": lambda step: noam_lr(step, d_model=s.d_model, warmup=s.warmup),
        "seed": s.seed,
        "device": device,
    }
    checkpoints = folder / "checkpoints"
    kept = {"folder": checkpoints, "every": s.every, "settings": asdict(s)}
    losses = fit(model, batches["train"], loss, n_steps=s.n_steps, **terms, **kept)

    paths = sorted(checkpoints.glob("step-????????"))
    curve = {}
    for path in paths:
        load_checkpoint(path, model.eval())
        curve[int(path.name.removeprefix("step-"))] = mean_loss(model, batches["val"], device)
    load_weights(model, average_checkpoints(paths[-s.n_averaged :]))
    averaged = mean_loss(model, batches["val"], device)
    translations = translate(model, tokenizer, splits["test"], settings, device)
    folder.joinpath("translations.txt").write_text("\n".join(translations) + "\n", "utf-8")
    bleu = sacrebleu.BLEU()
    score = bleu.corpus_score(translations, [[pair.target for pair in splits["test"]]])
    return {
        "settings": asdict(s),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": tokenizer.vocab_size,
        "train_loss": [sum(part) / len(part) for part in in_parts(losses, s.every)],
        "val_loss": curve,
        "val_loss_averaged": averaged,
        "test_bleu": score.score,
        "bleu": str(bleu.get_signature()),
        **speed(model, batches["train"], terms, settings),
    }


def in_parts(items: list, size: int) -> list[list]:
    """Cut a list into parts, the last of which may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def mean_loss(model: EncoderDecoder, batches: TokenBatches, device: str) -> float:
    """Give the mean loss per target, without label smoothing."""
    sums = [loss(model, batch.to(device), smoothing=0.0) for batch in batches(0)]
    return float(sum(total for total, _ in sums)) / sum(n for _, n in sums)


def translate(
    model: EncoderDecoder,
    tokenizer: BPETokenizer,
    pairs: list[Pair],
    settings: Settings,
    device: str,
) -> list[str]:
    """Translate by beam search, sentences of like length together; in the order of the pairs."""
    pad, bos, eos = (tokenizer.special_tokens[name] for name in SPECIALS)
    sources = [tokenizer.encode(pair.source) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(sources[i]))
    translations = [""] * len(pairs)
    for rows in in_parts(order, 100):
        batch = Batch.of([(sources[i], []) for i in rows], pad=pad, bos=bos, eos=eos).to(device)
        found = beam_search(
            model,
            batch.target_in,
            source=batch.source,
            source_mask=batch.source_mask[:, 0, 0],
            max_new_tokens=batch.source.shape[1] + 50,
            n_beams=settings.n_beams,
            length_penalty=settings.length_penalty,
            stop=eos,
        )
        for i, tokens, length in zip(rows, found.tokens[:, 0], found.lengths[:, 0], strict=True):
            ids = [t for t in tokens[:length].tolist() if t not in (pad, bos, eos)]
            translations[i] = tokenizer.decode(ids).strip()
    return translations


def speed(
    model: EncoderDecoder, batches: TokenBatches, terms: Mapping[str, object], settings: Settings
) -> dict[str, float]:
    """Time one epoch of training, and hold its operations against those of a matrix product."""
    device, epoch = terms["device"], list(batches(0))
    synchronize(device)
    start = perf_counter()
    fit(model, lambda _: epoch, loss, n_steps=len(epoch), **terms)
    synchronize(device)
    seconds = perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        for batch in epoch:
            loss(model, batch.to(device))[0].backward()
    n_tokens = sum(batch.n_tokens + int(batch.source_mask.sum()) for batch in epoch)
    flops, peak = counter.get_total_flops() / seconds, matmul_peak(device, size=settings.peak_size)
    return {
        "tokens_per_second": n_tokens / seconds,
        "flops_per_second": flops,
        "matmul_peak": peak,
        "share_of_peak": flops / peak,
    }


def main() -> None:
    """Read the files, train, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder with the files of Multi30k")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    names = {"train": "train", "val": "val", "test": "test_2016_flickr"}
    splits = {name: multi30k(arguments.data, split) for name, split in names.items()}
    values = run(splits, Settings(), arguments.device, arguments.out)
    record = new_record("multi30k", values, device=arguments.device, modules=MODULES)
    print(save_record(record, arguments.out).read_text("utf-8"))


if __name__ == "__main__":
    main()
