"""What the warm start from a text model does to its text: loss before and after, in nats a token.

A small Llama is trained here on the world's texts, by `transformers`; then begun from, with and
without QK-norm.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import parser, report
from torch import Tensor

from openchameleon.checkpoints.convert import WarmStart, convert, load_transformer, open_checkpoint
from openchameleon.model.transformer import Transformer
from openchameleon.pipeline import find_model
from openchameleon.world.atlas import PRESETS
from openchameleon.world.sample import MIXTURE, all_texts

N_PIECES, ROW_LEN, BATCH = 600, 128, 16


def main() -> None:
    args = parser(__doc__).parse_args()
    steps, n_texts = (5, 300) if args.quick else (600, 20_000)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        train, held_out = rows(root / "llama", n_texts)
        source = trained(root / "llama", train, steps)
        sizes = {"model": "llama, 4 layers of 128", "steps": steps, "tokens": held_out.numel()}
        losses = {"source": loss(lambda ids: source(ids).logits, held_out)}
        for case, qk_norm in (("without_qk_norm", False), ("with_qk_norm", True)):
            start = WarmStart(find_model("nano") / "image_tokenizer", qk_norm)
            convert(root / "llama", root / case, "native", warm_start=start)
            model = load_transformer(open_checkpoint(root / case))
            losses |= both(case, model, held_out)
        sizes |= {"text_ids": N_PIECES, "new_ids": model.config.vocab_size - N_PIECES}
        report("warm_start/text_loss", args.out, sizes, **losses)


def rows(folder: Path, n_texts: int) -> tuple[Tensor, Tensor]:
    """Packed rows of text to learn from and to judge by; writes the tokenizer into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = list(all_texts(PRESETS["nano"], MIXTURE, n_texts, seed=0))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=N_PIECES, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    ids = [i for text in texts for i in (0, *tokenizer.encode(text).ids)]
    packed = torch.tensor(ids[: len(ids) // ROW_LEN * ROW_LEN]).view(-1, ROW_LEN)
    n = max(len(packed) // 20, 1)
    return packed[:-n], packed[-n:]


def trained(folder: Path, data: Tensor, steps: int) -> Any:
    """A Llama after `steps`, saved in `folder`."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=N_PIECES, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=ROW_LEN,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        batch = data[torch.randint(len(data), (BATCH,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    return model


def both(case: str, model: Transformer, data: Tensor) -> dict[str, float]:
    """The loss among the ids of the text model, as where text is written, and among all."""
    text = loss(lambda ids: model(ids)[..., :N_PIECES], data)
    return {case: text, f"{case}_all_ids": loss(model, data)}


@torch.no_grad()
def loss(logits: Any, data: Tensor) -> float:
    """Mean cross-entropy of the next id, in nats."""
    total = [
        F.cross_entropy(logits(r)[:, :-1].flatten(0, 1), r[:, 1:].flatten()) for r in data.split(16)
    ]
    return float(torch.stack(total).mean())


if __name__ == "__main__":
    main()
