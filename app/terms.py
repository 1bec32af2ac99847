"""What every figure of the page means: the core's metrics, those that only the page has, and the page that lists both.

Panels write a figure's name with `term`: a link to its definition, which is also its tooltip. `docs/METRICS.md` and
`/ui/metrics`, which works offline, are made from the same tables.
"""

from __future__ import annotations

from html import escape

from moepic_core.metrics import METRICS, Metric

HISTORY_TOKENS = 240
SPEED_TOKENS = 8
TRAFFIC_WINDOW_S = 2.0
CEILING_TOKENS = 512
NUM_WORST = 3

# Formulas as in METRICS, over the rows that the definition names.
PAGE_METRICS: tuple[Metric, ...] = (
    Metric("ceiling", "0..1", f"The best that a cache with as many slots can do: the share of uses that find their "
           f"expert in it when it always evicts what is needed again last (Belady), over the newest {CEILING_TOKENS} "
           "decoded tokens, each with the slots of its time, from an empty cache. Those of the last reply, or all. "
           "Experts that were prefetched in time are hits, but not here, so a layer can be above its ceiling."),
    Metric("worst_layers", "layers", f"The {NUM_WORST} layers with the greatest share of misses, worst first."),
    Metric("speed_history", "tokens/s", f"Speed of the newest {HISTORY_TOKENS} tokens, without the first of a reply: "
           "1 / the time since the token before.", "1 / seconds[kind == TOKEN]"),
    Metric("speed_now", "tokens/s", f"Mean speed of the newest {SPEED_TOKENS} of these.",
           f"{SPEED_TOKENS} / np.sum(seconds[kind == TOKEN][-{SPEED_TOKENS}:])"),
    Metric("token_s", "s", "Time that the last token took, since the one before it.", "seconds[kind == TOKEN][-1]"),
    Metric("token_stall_s", "s", "Time of the last token for which compute had nothing to do but wait for the link.",
           "np.sum(seconds[kind == STALL])"),
    Metric("token_overlap", "0..1", "1 − stall / link busy time of the last token, its own transfers alone.",
           "max(0, 1 - np.sum(seconds[kind == STALL]) / np.sum(credit))"),
    Metric("on_device", "count", "Experts that are on the device, whole or with their top segment alone.",
           "np.sum(residency > 0)"),
    Metric("use", "0..1", "How often an expert was used while decoding in this session, of its layer's most used one.",
           "activations / activations.max(axis=1)"),
    Metric("expert_traffic", "bytes/s", "What the engine brought to the device, by its own count: demand loads and "
           f"prefetches that ended within the last {TRAFFIC_WINDOW_S:g} s, per second. This is the truth about "
           "experts; the driver's figures for the bus are the check from outside.",
           f"np.sum(nbytes[np.isin(kind, (DEMAND, PREFETCH))]) / {TRAFFIC_WINDOW_S:g}"),
    Metric("device_memory", "bytes", "What is used of the device's memory, as the driver (without a GPU: the operating "
           "system) says, by kind: ours by our own books; unaccounted, which this process holds beside them (the "
           "driver's own needs, Python, libraries); other programs. The tick is the budget. What is reserved and was "
           "never touched is not used yet, and is left out of workspace and KV cache."),
    Metric("gpu_use", "0..1", "Share of the time in which the GPU had something to run, as its driver says."),
    Metric("pcie_in", "bytes/s", "What crosses the bus towards the GPU, as its driver says: measured over 20 ms."),
    Metric("pcie_out", "bytes/s", "What crosses the bus away from the GPU, likewise."),
    Metric("power", "W", "What the GPU draws. A full bar is its limit."),
    Metric("temperature", "°C", "Of the GPU. A full bar is where it would slow down."),
    Metric("vram", "bytes", "Used memory of the GPU."),
    Metric("ram", "bytes", "Used memory of the machine, without files that would yield."),
    Metric("cpu_use", "0..1", "Share of all cores' time that programs used."),
    Metric("compared_speed", "tokens/s", "Decode speed of one prompt under these settings: 1 / the median time of a "
           "token over all passes, without the first tokens of each, which find caches that are still filling.",
           "1 / np.median(seconds[kind == TOKEN])"),
    Metric("compared_ratio", "×", "This speed / the one with cache, split and prefetch switched off."),
    Metric("compared_bytes", "bytes", "What came over the link, demand loads and prefetches, per counted token.",
           "np.sum(nbytes[np.isin(kind, (DEMAND, PREFETCH))]) / np.sum(kind == TOKEN)"),
    Metric("compared_stall", "s", "Time for which compute had nothing to do but wait for the link, per counted token.",
           "np.sum(seconds[kind == STALL]) / np.sum(kind == TOKEN)"),
    Metric("predicted_tpot", "s", "Time per output token that the cost model expects of a plan: from costs measured on "
           "this machine and what recorded tokens would find cached and guessed. Simulated: the same tokens replayed "
           "event by event with the engine's own rules."),
    Metric("replayed_hits", "0..1", "Share of recorded uses that find their expert in a cache of so many slots under a "
           "policy, from an empty cache, without prefetch. Belady evicts what is needed again last; nothing can do "
           "better."),
    Metric("disk_read", "bytes/s", "What is read from this machine's disks. A full bar is the most seen so far."),
)  # fmt: skip
_ALL = {metric.name: metric for metric in (*METRICS, *PAGE_METRICS)}

_STYLE = """
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 "IBM Plex Sans", system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8886; }
  code { font-size: .87em; overflow-wrap: anywhere; }
  tr:target { background: #56b4e944; }
"""


def define(name: str) -> str:
    """Definition and unit of the figure `name`."""
    return f"{_ALL[name].definition} ({_ALL[name].unit})"


def term(label: str, name: str) -> str:
    """HTML of `label`: a link to the definition of figure `name`, with that definition as its tooltip."""
    return (
        f'<a class="term" href="ui/metrics#{name}" target="moepic-metrics" data-tip="{escape(define(name))}">'
        f"{escape(label)}</a>"
    )


def page() -> str:
    """A plain HTML page of all definitions."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>MoEpic: figures</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="favicon.svg">'
        f"<style>{_STYLE}</style></head><body><h1>Figures</h1>"
        "<p>What every figure of the page means, and how to recompute it from the trace; as in docs/METRICS.md. "
        "A hit rate without further words is that of decode. – means unknown, never zero.</p>"
        f"{_table(PAGE_METRICS, 'Of the panels')}{_table(METRICS, 'Of the engine')}</body></html>"
    )


def _table(metrics: tuple[Metric, ...], title: str) -> str:
    rows = "".join(
        f'<tr id="{metric.name}"><td><code>{metric.name}</code></td><td>{escape(metric.unit)}</td>'
        f"<td>{escape(metric.definition)}</td><td><code>{escape(metric.formula)}</code></td></tr>"
        for metric in metrics
    )
    head = "<tr><th>Figure</th><th>Unit</th><th>Definition</th><th>Formula</th></tr>"
    return f"<h2>{title}</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table>"
