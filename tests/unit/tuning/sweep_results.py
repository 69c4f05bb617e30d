"""Results of sweeps for the tests, and a reader of the page made of them."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br"}


def sweep(trials: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Results of a finished sweep of these trials; the best is the finished one with the lowest value."""
    finished = [trial for trial in trials if trial["state"] == "finished"]
    return {
        "name": "support-sweep",
        "metric": "eval_loss",
        "mode": "min",
        "searcher": "optuna",
        "scheduler": "asha",
        "execution": "fused",
        "why": "the trials share a base",
        "started": "2026-11-21T18:00:00+00:00",
        "seconds": 200.0,
        "complete": True,
        "budget": {
            "trials": 20,
            "max_hours": None,
            "max_gpu_hours": None,
            "max_tokens": None,
            "spent": {"trials": len(trials), "hours": 0.05, "gpu_hours": 0.0, "tokens": 12_345},
        },
        "space": {
            "train.learning_rate": {"kind": "loguniform", "low": 1e-5, "high": 1e-3},
            "adaptation.rank": {"kind": "choice", "values": [4, 8]},
            "adaptation.lora_alpha": {"kind": "choice", "values": [8, 16], "when": {"adaptation.rank": [8]}},
        },
        "baseline": 9.0,
        "trials": trials,
        "best": min(finished, key=lambda trial: trial["value"])["trial"] if finished else None,
        "retrained": None,
        "artifact": None,
        "winner": None,
    } | changes


def trial(number: int, values: dict[str, Any], curve: list[float], **changes: Any) -> dict[str, Any]:
    """A finished trial that reported a curve, 100 tokens, ten steps and a second apart."""
    reports = [
        {"report": n, "step": 10 * n, "tokens": 100 * n, "seconds": float(n), "value": value}
        for n, value in enumerate(curve, 1)
    ]
    return {
        "trial": number,
        "values": values,
        "state": "finished",
        "why": "",
        "value": curve[-1] if curve else None,
        "std": None,
        "reports": reports,
        "tokens": 100 * len(curve),
        "lineage": [],
    } | changes


class Element:
    """An element of a page: its tag, its attributes, and all text inside it."""

    def __init__(self, tag: str, attributes: dict[str, str], parents: list[Element]) -> None:
        self.tag, self.attributes, self.parents = tag, attributes, parents
        self.text = ""

    def has(self, name: str) -> bool:
        return name in self.attributes.get("class", "").split()


class Page(HTMLParser):
    """The elements of a page in their order; it fails on an end tag that closes nothing or the wrong element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, list(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}, list(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> within <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str, name: str = "", within: str = "") -> list[Element]:
        """Elements of a tag, with a class if one is given, within an element of another class if one is given."""
        return [
            element
            for element in self.elements
            if element.tag == tag
            and (not name or element.has(name))
            and (not within or any(parent.has(within) for parent in element.parents))
        ]

    def one(self, tag: str, name: str = "", within: str = "") -> Element:
        found = self.all(tag, name, within)
        assert len(found) == 1, f"{len(found)} of <{tag} class={name}>"
        return found[0]

    def line(self, chart: int, number: int) -> str:
        """The path of a trial's line in the n-th drawing of the page."""
        drawing = [element for element in self.elements if element.tag == "svg"][chart]
        found = [
            element.attributes["d"]
            for element in self.elements
            if element.has("line")
            and drawing in element.parents
            and element.parents[-1].attributes["data-t"] == str(number)
        ]
        assert len(found) == 1, f"{len(found)} lines of trial {number}"
        return found[0]
