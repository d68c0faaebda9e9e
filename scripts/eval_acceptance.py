"""Acceptance of a trained draft head on answers to messages that its training did not have.

    python scripts/eval_acceptance.py --pair smollm2 --json-out acceptance.json
    python scripts/eval_acceptance.py --target DIR --draft HEAD --prompts FILE --temperature 0

The target answers every message of --prompts (one a line; by default train/other_prompts.txt, kinds that are never trained on) by itself, at
temperature 1 or greedily. The head is then measured on these answers as training measures it: the mean of sum min(p, q), which is what a draft
drawn from q is accepted with (Leviathan et al., 2023, arXiv 2211.17192), and the tokens a step when --proposals are drafted at a time.
Text at temperature 1 differs from run to run: --repeats draws more answers to each message.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draft.head_file import read_draft_head
from draft.pretrained import shipped_draft_head
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.files import write_atomically
from engine.hub.pairs import PAIRS
from engine.hub.resolve import resolve_model, resolve_target
from engine.model.decoder import Decoder
from engine.runtime.sampling import SamplingParams
from engine.text.chat_opening import ChatOpening, chat_opening
from engine.train.data import read_messages
from engine.train.documents import TokenDocuments
from engine.train.loss import TeacherHead
from engine.train.measure import measure
from engine.train.state_model import student_of
from engine.train.training import teacher_of

OTHER_PROMPTS = Path(__file__).parent / "train" / "other_prompts.txt"
BATCH = 50  # answers at a time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), help="a known pair's target")
    parser.add_argument("--target", help="model folder or hub id, instead of --pair")
    parser.add_argument("--draft", metavar="DIR", help="folder of the draft head (default: the one that ships for the target's shape)")
    parser.add_argument("--prompts", default=str(OTHER_PROMPTS), metavar="FILE", help="users' messages, one a line")
    parser.add_argument("--temperature", type=int, choices=(0, 1), default=1, help="of the answers (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=220, help="of an answer (default 220)")
    parser.add_argument("--repeats", type=int, default=1, help="answers to each message (default 1)")
    parser.add_argument("--proposals", type=int, default=4, help="drafts a step of the replay (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the answers and of what is measured")
    parser.add_argument("--json-out", metavar="FILE", help="write the figures")
    return parser.parse_args()


def answers(engine: Engine, chat: ChatOpening, messages: list[list[int]], args: argparse.Namespace) -> TokenDocuments:
    """What the target alone answers, as documents of template, message and answer."""
    prompts = [[*chat.opening, *message, *chat.closing] for message in messages for _ in range(args.repeats)]
    documents: list[list[int]] = []
    for begin in range(0, len(prompts), BATCH):
        some = prompts[begin : begin + BATCH]
        params = [
            SamplingParams(
                max_new_tokens=args.max_new_tokens, temperature=float(args.temperature), draft_length=0, seed=args.seed + begin + number
            )
            for number in range(len(some))
        ]
        documents += [prompt + list(result.token_ids) for prompt, result in zip(some, engine.generate(some, params), strict=True)]
    return TokenDocuments.of(documents, [len(chat.opening)] * len(documents), [len(prompt) for prompt in prompts], {})


@torch.no_grad()
def measured(decoder: Decoder, folder: Path, documents: TokenDocuments, args: argparse.Namespace) -> dict[str, Any]:
    """The head's figures on the documents (`engine.train.measure.Measured`), and the share of the answers' tokens that its vocabulary holds."""
    config, tensors = read_draft_head(folder)
    token_ids = tensors.pop("token_ids")
    teacher = teacher_of(decoder)
    own_head = config.head == "own"
    student = student_of(teacher, config.num_layers, token_ids, own_head=own_head, state_layers=config.state_layers).requires_grad_(False)
    student.load_tensors(tensors)
    found = measure(
        teacher,
        student,
        TeacherHead.of(teacher.head, token_ids),
        config.exit_layer,
        documents,
        greedy=args.temperature == 0,
        proposals=args.proposals,
        batch_tokens=4096,
        chunk=1024,
    )
    said = np.concatenate([documents.document(i)[documents.answers[i] :] for i in range(len(documents))])
    return found.as_dict() | {"coverage": round(float(np.isin(said, token_ids.numpy()).mean()), 4), "head_digest": config.digest}


def run(args: argparse.Namespace) -> int:
    if (args.pair is None) == (args.target is None):
        raise InvalidOption("either --pair or --target is needed, and not both", f"for example --pair {min(PAIRS)}")
    for name, value in (("--max-new-tokens", args.max_new_tokens), ("--repeats", args.repeats), ("--proposals", args.proposals)):
        if value < 1:
            raise InvalidOption(f"{name} cannot be {value}", "give 1 or more")
    folder = resolve_target(args.pair) if args.pair else resolve_model(args.target)
    with closing(Engine.from_pretrained(folder, args.draft or "none", device=args.device, dtype=args.dtype)) as engine:
        decoder = engine.core.target
        head = Path(args.draft) if args.draft else shipped_draft_head(decoder.config)
        if head is None:
            raise InvalidOption(f"no draft head ships for a target of the shape of {folder.name}", "name one with --draft")
        chat = chat_opening(engine.tokenizer, decoder.config.eos_token_ids)
        if not chat.closing:
            raise InvalidOption("a model without a chat template answers no messages", "use a model for chats")
        documents = answers(engine, chat, read_messages(args.prompts, engine.tokenizer), args)
        figures = measured(decoder, head, documents, args)
    document = {
        "target": PAIRS[args.pair].target.name if args.pair else folder.name,
        "prompts": Path(args.prompts).name,
        "answers": len(documents),
        "temperature": args.temperature,
        "seed": args.seed,
        "proposals": args.proposals,
        "device": torch.cuda.get_device_name(decoder.device) if decoder.device.type == "cuda" else "cpu",
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    } | figures
    if args.json_out:
        write_atomically(args.json_out, json.dumps(document, indent=1) + "\n")
    print(
        f"{len(documents)} answers, {figures['positions']:,} tokens at temperature {args.temperature}: acceptance {figures['acceptance']:.3f}, "
        f"agreement {figures['agreement']:.3f}, {figures['tokens_per_step']:.2f} tokens a step of {args.proposals} drafts, by position "
        f"{', '.join(f'{share:.2f}' for share in figures['by_position'])}; the target puts {figures['covered']:.3f} into the head's vocabulary"
    )
    return 0


def main() -> int:
    try:
        return run(arguments())
    except ForetoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
