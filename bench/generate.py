"""Generation through the engine: text tokens a second, seconds a picture, prompt tokens a second.

Greedy; pictures as codes. `of_copy`, `of_matmul`: parts of the measured bandwidth and product rate.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from common import MATMUL_OPS, Run, matmul, medians, parser, report

from openchameleon.inference.engine import Engine
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.sequence import Request
from openchameleon.model.flops import forward_flops_per_token, matrix_weights
from openchameleon.model.transformer import Transformer
from openchameleon.pipeline import Chameleon, embedded_models
from openchameleon.recipes.nano import recipe
from openchameleon.recipes.stages import model_config, vocab_of

GREEDY = SamplingParams(ModalityParams(temperature=0), ModalityParams(temperature=0))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="nano", help="an embedded model, or a model folder")
    args = arguments.parse_args()
    engine, name = load(args.model)
    config, n_image = engine.model.config, engine.vocab.image.item_len
    n_new, n_long = (4, 32) if args.quick else (128, config.max_seq_len * 7 // 8)
    cases = {  # tokens of the prompt, new ids, params
        "text": (16, n_new, replace(GREEDY, mode="text", max_tokens=n_new)),
        "prefill": (n_long, 1, replace(GREEDY, mode="text", max_tokens=1)),
        "picture": (16, n_image, replace(GREEDY, mode="image")),
        "guided_picture": (16, n_image, replace(GREEDY, mode="image", guidance_text=3.0)),
    }
    source, target = torch.rand(2, 2**26)  # 256 MiB each, beyond any cache
    for batch in (1, 8):
        runs: dict[str, Run] = {"matmul": matmul(), "copy": lambda: target.copy_(source)}
        runs |= {case: answers(engine, batch, *what) for case, what in cases.items()}
        took = medians(runs, repeats=1 if args.quick else 5)
        read = 4 * matrix_weights(config) * n_new / (8 * len(source) / took["copy"])
        ops = forward_flops_per_token(config, (n_long + 1) / 2) - 2 * config.vocab_size * config.dim
        prompts = batch * n_long / took["prefill"]
        used = prompts * ops * took["matmul"] / MATMUL_OPS
        values = {
            "text": {"tokens_per_s": batch * n_new / took["text"], "of_copy": read / took["text"]},
            "prefill": {"tokens_per_s": prompts, "of_matmul": used},
        }
        for case, (n_prompt, n_ids, _) in cases.items():
            sizes = {"model": name, "batch": batch, "prompt": n_prompt, "new_ids": n_ids}
            picture = {"seconds_per_picture": took[case] / batch}
            report(f"generate/{case}", args.out, sizes, **values.get(case, picture))


def load(name: str) -> tuple[Engine, str]:
    """An engine in which no answer ends early: eos and unk, never written, change places."""
    if name == "nano" and name not in embedded_models():
        name, model, vocab = "random nano", Transformer(model_config(recipe())), vocab_of(recipe())
        model.init_weights(seed=0)
    else:
        chameleon = Chameleon.from_pretrained(name, device="cpu")
        model, vocab = chameleon.model, chameleon.config.vocab
    return Engine(model.eval(), replace(vocab, eos_id=vocab.unk_id, unk_id=vocab.eos_id)), name


def answers(engine: Engine, batch: int, n_prompt: int, n_ids: int, params: SamplingParams) -> Run:
    """Random prompts, never the same (they would not be read again), each answered by n_ids ids."""
    span, rng = (engine.vocab.text_start, engine.vocab.text_stop), torch.Generator().manual_seed(0)

    def run() -> None:
        ids = torch.randint(*span, (batch, n_prompt), generator=rng)
        requests = [Request([engine.vocab.bos_id, *row[1:]], params) for row in ids.tolist()]
        counts = [len(completion.token_ids) for completion in engine.generate(requests)]
        assert counts == [n_ids] * batch, f"{counts} new ids, not {n_ids} each"

    run()
    return run


if __name__ == "__main__":
    main()
