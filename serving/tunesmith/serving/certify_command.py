"""`tunesmith certify`: shows the verdict, and keeps it beside the run."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cluster.artifacts import ServedReceipt
from tunesmith.cluster.console import print_json, say, stdout
from tunesmith.cluster.errors import ReceiptError
from tunesmith.cluster.storage import write_atomic
from tunesmith.serving.certify import Service, certify


def run(artifact: Path, model: str, base: str | None, url: str, key: str | None, as_json: bool) -> None:
    """Holds a served model against its artifact.

    Raises:
        ReceiptError: it is not the model that was trained.
        UsageError: it cannot be asked.
    """
    receipt = certify(artifact, Service(url, key), model, base)
    beside = artifact.absolute().parent / "receipts"
    if beside.is_dir():
        write_atomic(beside / "served.json", receipt.model_dump_json(indent=1) + "\n")
    if as_json:
        print_json(receipt.model_dump(mode="json"))
    elif receipt.passed:
        say(stdout(), described(receipt))
    if not receipt.passed:
        raise ReceiptError(
            f"{model} at {url} is not the model of {artifact}: {'; '.join(receipt.problems)}",
            "Look at which version the name leads to (tunesmith adapters list), its base, and its chat template.",
        )


def described(receipt: ServedReceipt) -> str:
    """A passed receipt in words."""
    template = {True: "the chat template gives the same tokens", None: "there is no chat template", False: ""}
    change = f", {receipt.base_difference:.2g} away from the base" if receipt.base_difference is not None else ""
    version = "the base alone" if receipt.version == "none" else f"version {receipt.version[:12]}"
    return (
        f"{receipt.model} ({version}) answers as it was trained: {receipt.tokens} tokens of "
        f"{receipt.rows} held-out rows within {receipt.difference:.2g} nats{change}; "
        f"{template[receipt.template_matches]}."
    )
