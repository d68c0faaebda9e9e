"""The model card of a trained draft head, written from the measured figures."""

from __future__ import annotations

from typing import Any

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon (AdamW for head and vectors)"}


def model_card(target: str, licence: str, command: str, figures: dict[str, Any]) -> str:
    """README.md of a draft head's folder.

    Args:
        target: name of the model it was trained for.
        licence: the target's.
        command: that printed the figures.
        figures: as `engine.train.training.DraftHeadTraining.save` returns them; with a start, what `start_from` returned.
    """
    a, options, data = figures["architecture"], figures["options"], figures["data"]
    head = "a head of its own" if a["head"] == "own" else "the rows of the target's head"
    temperatures = "{:g} to {:g}".format(*data["temperatures"])
    variation = f"from {options['mix_from']:.0%} to {options['mix_to']:.0%} of the training on"
    lines = [
        f"# Draft head for {target}",
        "",
        f"Proposes tokens for {target} in speculative decoding. {_below(a)}, then {a['own_layers']} trained "
        f"{_plural(a['own_layers'], 'layer')}, a final norm and {head} over the {a['vocab_size']:,} tokens the target "
        f"uses most. The output stays the target's, whatever is proposed.",
        "",
        "## Figures",
        f"On {figures['held_out_documents']:,} held-out conversations that the target wrote, over the answers' tokens, 4 tokens proposed a step "
        f"(text at temperature 1, and greedy text), measured with the weights as stored ({figures['stored_bits']} bits) and as trained:",
        "",
        "| | stored | as trained |",
        "|---|---|---|",
        *_rows(figures),
        "",
        *_kinds(figures),
        f"A draft step reads {figures['draft_step_cost']:.1%} of the weights a target step reads. The {a['vocab_size']:,} tokens are "
        f"{figures['coverage']:.2%} of what the target writes.",
        "",
        "## Training",
        f"- Data: {data['drawn_tokens']:,} tokens in {figures['data_documents']:,} conversations, drawn from the target itself given only the "
        f"opening of its chat template, at temperatures {temperatures}, up to {data['context']} tokens long, seed {data['seed']}{_added(data)}.",
        *_start(figures),
        f"- Distillation on the target's distribution over answers: divergence first, total variation {variation}; "
        f"{figures['steps']:,} steps, {figures['trained_tokens']:,} predicted tokens, {figures['epochs']:g} epochs, "
        f"{figures['training_seconds']:,.0f} s on {figures['device']} with PyTorch {figures['torch']}; {_OPTIMIZERS[options['optimizer']]}, peak rate "
        f"{options['learning_rate']:g}, seed {options['seed']}, averaged weights.",
        "- Command, which also printed every figure on this card:",
        "",
        f"      {command}",
        "",
        "## Licence",
        f"Derived from {target}: {licence}.",
        "",
    ]
    return "\n".join(lines)


def _below(architecture: dict[str, Any]) -> str:
    """What the trained layers go on from."""
    layers = architecture.get("state_layers")
    if not layers:
        return f"The target's own first {architecture['trunk_layers']} layers"
    return (
        f"A matrix that joins a token's embedding with the target's states of the token before, after layers {', '.join(map(str, layers))}"
    )


def _kinds(figures: dict[str, Any]) -> list[str]:
    lines = []
    for kind, messages in (
        ("given_", "messages of the given kind that were held out"),
        ("other_", "messages of kinds that are never trained on"),
    ):
        if kind + "greedy" in figures:
            lines += [
                f"The same on its answers to {messages}:",
                "",
                "| | stored | as trained |",
                "|---|---|---|",
                *_rows(figures, kind),
                "",
            ]
    return lines


def _start(figures: dict[str, Any]) -> list[str]:
    if "start" not in figures:
        return []
    names = (("", "the target's own questions"), ("given_", "given messages"), ("other_", "messages of other kinds"))
    found = [(figures["start"].get(kind + "temperature_1"), name) for kind, name in names]
    before = ", ".join(f"{group['acceptance']:.3f} on answers to {name}" for group, name in found if group)
    return [f"- Begun with an earlier draft head of this shape, whose acceptance at temperature 1 with this vocabulary was {before}."]


def _rows(figures: dict[str, Any], kind: str = "") -> list[str]:
    stored = figures["stored"]
    names = [
        ("temperature_1", "acceptance", "acceptance at temperature 1, sum of min(p, q)"),
        ("temperature_1", "tokens_per_step", "tokens a step at temperature 1"),
        ("temperature_1", "by_position", "accepted at position 1 to 4 of a proposal, temperature 1"),
        ("greedy", "agreement", "greedy agreement"),
        ("greedy", "tokens_per_step", "tokens a step, greedy"),
        ("greedy", "by_position", "accepted at position 1 to 4 of a proposal, greedy"),
    ]
    return [f"| {text} | {_text(stored[kind + group][key])} | {_text(figures[kind + group][key])} |" for group, key, text in names]


def _text(value: Any) -> str:
    return ", ".join(f"{x:.3f}" for x in value) if isinstance(value, list) else f"{value:.3f}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"


def _added(data: dict[str, Any]) -> str:
    given, share = data.get("given_messages", 0), data.get("given_share", 0.0)
    begun = f"; {share:.0%} of the conversations begin with one of {given:,} given messages" if given else ""
    return begun + (f"; and {data['text_tokens']:,} tokens of other text" if "text_tokens" in data else "")
