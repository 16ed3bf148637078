"""Builds the Grafana dashboard of the pipeline: data and LLM calls, training, GPUs, the filter.

    python cluster/dashboard.py          # writes cluster/grafana/gubs.json

Every expression reads metrics that Ray exports to Prometheus: Ray's own (ray_node_*, ray_serve_*), gubs' (ray_gubs_*)
and vLLM's (ray_vllm_*). Needs the package grafana-foundation-sdk, which the extra `dev` has.
"""

from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries

OUT = Path(__file__).parent / "grafana" / "gubs.json"
PHASES = ("rollout", "reward", "reference", "check", "train", "sync", "checkpoint", "waiting_for_data")
"""Phases of a training step that are shown."""
_RATE = "$__rate_interval"
_RUN = '{run=~"$run",rank="0"}'
"""The figures of a training that are the same for all workers, from one of them."""
_ENGINE = '{application=~"filter-.*"}'


@dataclass(frozen=True)
class Chart:
    """A panel: its title, unit, and (expression, legend) of each curve."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    stacked: bool = False


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[{_RATE}]))"


def _quantile(q: float, metric: str, by: str, where: str = "") -> str:
    return f"histogram_quantile({q:g}, {_rate(f'{metric}_bucket{where}', f'{by}, le')})"


def _share(hits: str, queries: str, by: str) -> str:
    return f"{_rate(hits, by)} / {_rate(queries, by)}"


DATA = (
    Chart(
        "LLM calls", "reqps", ((_rate("ray_gubs_llm_calls_total", "role, failure"), "{{role}}, failure {{failure}}"),)
    ),
    Chart(
        "LLM tokens per second",
        "short",
        ((_rate("ray_gubs_llm_tokens_total", "role, direction"), "{{role}} {{direction}}"),),
    ),
    Chart("Decoded videos per second", "short", ((_rate("ray_gubs_decoded_videos_total", "verdict"), "{{verdict}}"),)),
)
TRAINING = (
    Chart(
        "Seconds per step, by phase",
        "s",
        tuple((f"ray_gubs_seconds_{phase}{_RUN}", f"{{{{run}}}} {phase.replace('_', ' ')}") for phase in PHASES),
        stacked=True,
    ),
    Chart(
        "Raw reward by role",
        "short",
        tuple(
            (f"ray_gubs_reward_raw_{role}{_RUN}", f"{{{{run}}}} {name}")
            for role, name in (("t", "user"), ("s", "similar user"), ("g", "group"))
        ),
    ),
    Chart(
        "Parts of the reward",
        "short",
        tuple((f"ray_gubs_reward_{part}{_RUN}", f"{{{{run}}}} {part}") for part in ("format", "skip", "choice")),
    ),
    Chart(
        "Tokens per second",
        "short",
        tuple((f"ray_gubs_tokens_per_second_{kind}{_RUN}", f"{{{{run}}}} {kind}") for kind in ("rollout", "train")),
    ),
    Chart(
        "KL to the start",
        "short",
        ((f"ray_gubs_health_kl{_RUN}", "{{run}}"),),
    ),
    Chart(
        "Engine against trainer",
        "short",
        (
            (f"ray_gubs_health_mismatch{_RUN}", "{{run}} mismatch"),
            (f"ray_gubs_health_alarm{_RUN}", "{{run}} alarm"),
        ),
    ),
)
GPUS = (
    Chart("GPU utilisation", "percent", (("ray_node_gpus_utilization", "{{instance}} GPU {{GpuIndex}}"),)),
    Chart(
        "GPU memory in use",
        "percent",
        (
            (
                "100 * ray_node_gram_used / (ray_node_gram_used + ray_node_gram_available)",
                "{{instance}} GPU {{GpuIndex}}",
            ),
        ),
    ),
    Chart(
        "GPU memory of training workers",
        "gbytes",
        (
            ('ray_gubs_gpu_gib_peak{run=~"$run"}', "{{run}} worker {{rank}} peak"),
            ('ray_gubs_gpu_gib_all{run=~"$run"}', "{{run}} worker {{rank}} all processes"),
        ),
    ),
    Chart("CPU utilisation", "percent", (("ray_node_cpu_utilization", "{{instance}}"),)),
    Chart("Memory in use", "bytes", (("ray_node_mem_used", "{{instance}}"),)),
    Chart("Object store in use", "bytes", (("sum by (instance) (ray_object_store_memory)", "{{instance}}"),)),
)
FILTER = (
    Chart(
        "Requests per second", "reqps", ((_rate("ray_gubs_filter_requests_total", "code, mode"), "{{code}} {{mode}}"),)
    ),
    Chart(
        "Latency",
        "s",
        (
            *(
                (_quantile(q, "ray_gubs_filter_seconds", "mode", '{phase="total"}'), f"{{{{mode}}}} p{100 * q:g}")
                for q in (0.5, 0.95, 0.99)
            ),
            (_quantile(0.95, "ray_gubs_filter_seconds", "phase", '{phase!="total"}'), "{{phase}} p95"),
        ),
    ),
    Chart(
        "Decisions per second",
        "short",
        ((_rate("ray_gubs_filter_candidates_total", "decision, option"), "{{decision}}, option {{option}}"),),
        stacked=True,
    ),
    Chart("Errors per second", "short", ((_rate("ray_gubs_filter_errors_total", "code"), "{{code}}"),)),
    Chart(
        "Queue",
        "short",
        (
            ("sum(ray_gubs_filter_queue_candidates)", "candidates in work"),
            (f"sum by (application) (ray_serve_deployment_queued_queries{_ENGINE})", "{{application}} waiting chunks"),
        ),
    ),
    Chart(
        "Replicas",
        "short",
        (
            (
                "sum by (application, deployment) (ray_serve_deployment_replica_healthy)",
                "{{application}} {{deployment}} healthy",
            ),
            (
                "max by (application, deployment) (ray_serve_autoscaling_target_replicas)",
                "{{application}} {{deployment}} target",
            ),
        ),
    ),
    Chart(
        "Engine: questions",
        "short",
        (
            ("sum by (ReplicaId) (ray_vllm_num_requests_running)", "{{ReplicaId}} running"),
            ("sum by (ReplicaId) (ray_vllm_num_requests_waiting)", "{{ReplicaId}} waiting"),
        ),
    ),
    Chart(
        "Engine: tokens per second",
        "short",
        (
            (_rate("ray_vllm_prompt_tokens_total", "ReplicaId"), "{{ReplicaId}} prompt"),
            (_rate("ray_vllm_generation_tokens_total", "ReplicaId"), "{{ReplicaId}} answer"),
        ),
    ),
    Chart(
        "Engine: caches",
        "percentunit",
        (
            ("max by (ReplicaId) (ray_vllm_kv_cache_usage_perc)", "{{ReplicaId}} key-value cache in use"),
            (
                _share("ray_vllm_prefix_cache_hits_total", "ray_vllm_prefix_cache_queries_total", "ReplicaId"),
                "{{ReplicaId}} prefix cache hits",
            ),
        ),
    ),
)
ROWS = (("Data and LLM calls", DATA), ("Training", TRAINING), ("GPUs and nodes", GPUS), ("Filter", FILTER))


def build() -> str:
    """The dashboard as JSON, in the form that Grafana imports.

    Raises:
        ImportError: grafana-foundation-sdk is not installed.
    """
    from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    runs = (
        QueryVariable("run")
        .label("Training")
        .datasource(source)
        .query("label_values(ray_gubs_seconds_step, run)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )
    dashboard = (
        Dashboard("gubs")
        .uid("gubs")
        .tags(["gubs", "ray"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(runs)
    )
    for title, charts in ROWS:
        dashboard = dashboard.with_row(Row(title))
        for chart in charts:
            dashboard = dashboard.with_panel(_panel(chart).datasource(source))
    return JSONEncoder(sort_keys=True, indent=1).encode(dashboard.build()) + "\n"


def _panel(chart: Chart) -> "TimeSeries":
    from grafana_foundation_sdk.builders.common import StackingConfig, VizLegendOptions, VizTooltipOptions
    from grafana_foundation_sdk.builders.prometheus import Dataquery
    from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
    from grafana_foundation_sdk.models.common import LegendDisplayMode, StackingMode, TooltipDisplayMode

    legend = VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST).placement("bottom")
    panel = (
        TimeSeries()
        .title(chart.title)
        .unit(chart.unit)
        .span(8)
        .height(8)
        .axis_soft_min(0)
        .fill_opacity(30 if chart.stacked else 0)
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .legend(legend)
    )
    if chart.stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    for letter, (expression, name) in zip(ascii_uppercase, chart.curves, strict=False):
        panel = panel.with_target(Dataquery().expr(expression).legend_format(name).ref_id(letter))
    return panel


def expressions() -> list[str]:
    """The PromQL expressions of all panels."""
    return [expression for _, charts in ROWS for chart in charts for expression, _ in chart.curves]


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(build())
    print(f"wrote {OUT}")
