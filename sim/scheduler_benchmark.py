"""Schedules over one policy and one latency trace: what waiting, overlapping and joining chunks do to an arm.

Every line meets the same latencies on the same scenes, on simulated time, so that the results are the same however
often they are made. Latency is the trace's, not the decoder's own: how schedules compare is one question, what decoders
cost is another (sim/decode_benchmark.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim.decode_benchmark import Paired
from sim.evaluate import EvalConfig, Report, measure
from sim.latency import LatencyTrace
from sim.shares import merged, run_shares, shares
from vla import configs
from vla.checkpoints.bundle import Bundle
from vla.configs import describe
from vla.decoding.base import Decoder
from vla.errors import ConfigError
from vla.runtime.motion import Motion, pooled


@dataclass(frozen=True)
class Line:
    """name: as printed. decoder: name in configs/decoder. options: key=value. reference: name of the line that this one
    is paired with, "" for none. sequential: observe, infer, execute, one after the other. ensembling: name in
    configs/ensembling, "" for none; such a line asks again as soon as a chunk has come."""

    name: str
    decoder: str
    options: tuple[str, ...] = ()
    reference: str = ""
    sequential: bool = False
    ensembling: str = ""

    def made(self) -> Decoder:
        decoder: Decoder = configs.load("decoder", self.decoder, self.options)
        return decoder

    def config(self, base: EvalConfig, scale: float, lead: int) -> EvalConfig:
        """`base` with this schedule. lead: control periods that inference may take."""
        return replace(
            base,
            decoder=self.made(),
            ensembling=configs.load("ensembling", self.ensembling) if self.ensembling else None,
            scheduler="sequential" if self.sequential else "overlapped",
            execute=lead if self.ensembling else base.execute,
            lead=lead,
            latency_scale=scale,
        )


def _of_head(head: str, decoder: str, options: tuple[str, ...], *more: Line) -> tuple[Line, ...]:
    wait, overlap = f"stop and think, {head}", f"overlapped, {head}"
    return (
        Line(wait, decoder, options, sequential=True),
        Line(overlap, decoder, options, wait),
        Line(f"ensembled, {head}", decoder, options, overlap, ensembling="act"),
        *(replace(line, reference=overlap) for line in more),
    )


LINES = (
    *_of_head("FAST", "autoregressive", ("head=fast",), Line("continued, FAST", "continued", ("head=fast",))),
    *_of_head("bins", "autoregressive", ("head=bins",), Line("forced, bins", "forced", ("head=bins",))),
    *_of_head("flow", "flow", (), Line("real-time chunking, flow", "realtime")),
    *_of_head("diffusion", "diffusion", (), Line("real-time chunking, diffusion", "realtime_diffusion")),
)


def served(bundle: Bundle, lines: Sequence[Line]) -> tuple[list[Line], dict[str, str]]:
    """Which lines this bundle's heads serve, and why not the others."""
    good, refused = [], {}
    for line in lines:
        try:
            line.made().check(bundle)
            good.append(line)
        except ConfigError as error:
            refused[line.name] = str(error)
    return good, refused


def lead_for(latency: LatencyTrace, scale: float, period_s: float, execute: int) -> int:
    """Control periods that cover 99 % of the inferences, as far as a chunk's executed actions allow."""
    return min(execute, latency.scaled(scale).periods(period_s))


def compare(
    base: EvalConfig,
    lines: Sequence[Line],
    leads: dict[float, int],
    out: Path,
    workers: int,
    on_episodes: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Rows of plain data, per latency scale and line. leads: {scale: lead}, in the order of the rows. What `out` holds
    already is not run again; the shares of all lines go through the same processes."""
    wanted = {(scale, line): line.config(base, scale, lead) for scale, lead in leads.items() for line in lines}
    parts = {key: shares(config, out / _folder(*key)) for key, config in wanted.items()}
    flat = [(key, part) for key, of_key in parts.items() for part in of_key]
    ran = run_shares(_measure, [part for _, part in flat], workers, on_episodes)
    reports: dict[tuple[float, str], Report] = {}
    for key in wanted:
        reports[key[0], key[1].name] = merged([report for (other, _), report in zip(flat, ran) if other == key])
    return [
        _row(line, config, reports[scale, line.name], reports.get((scale, line.reference)))
        for (scale, line), config in wanted.items()
    ]


def _folder(scale: float, line: Line) -> str:
    return f"{scale:g}x-" + "".join(c if c.isalnum() else "-" for c in line.name)


def _measure(config: EvalConfig) -> Report:
    return measure(config)["none"]


def _row(line: Line, config: EvalConfig, report: Report, reference: Report | None) -> dict[str, Any]:
    episodes = report.episodes
    motions = [Motion.from_dict(episode.motion) for episode in episodes if episode.motion is not None]
    paired = None
    if reference is not None:
        paired = {"to": line.reference, **Paired.of(episodes, reference.episodes).to_dict()}
    return {
        "schedule": line.name,
        "scale": config.latency_scale,
        "scheduler": config.scheduler,
        "execute": config.execute,
        "lead": None if line.sequential else config.lead,
        "decoder": describe(config.decoder),
        "ensembling": describe(config.ensembling) if config.ensembling else None,
        "inferences_per_episode": round(sum(e.inferences for e in episodes) / len(episodes), 2),
        "steps_per_episode": round(sum(e.steps for e in episodes) / len(episodes), 2),
        **report.success.to_dict(),
        "paired_difference": paired,
        **pooled(motions),
    }
