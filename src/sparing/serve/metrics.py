"""/metrics in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats): what the engine counts, and the answers."""

from __future__ import annotations

from sparing.account.power import resident_memory
from sparing.serve.service import Service


def prometheus(service: Service) -> str:
    lines = []
    for name, value in sorted(service.engine.metrics().items()):
        lines += [f"# TYPE sparing_{name} {'counter' if name.endswith('_total') else 'gauge'}", f"sparing_{name} {value:.10g}"]
    lines.append("# TYPE sparing_http_requests_total counter")
    for (path, status), count in sorted(service.counts.items()):
        lines.append(f'sparing_http_requests_total{{path="{path}",status="{status}"}} {count}')
    lines += ["# TYPE sparing_energy_joules_total counter", f"sparing_energy_joules_total {service.energy.total():.6g}"]
    lines += ["# TYPE sparing_resident_bytes gauge", f"sparing_resident_bytes {resident_memory()}"]
    return "\n".join(lines) + "\n"
