"""A plan, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rafaga.plan.planning import Plan
from rafaga.plan.replica import ReplicaOutcome


def lines(plan: Plan) -> Iterator[str]:
    some = f"{plan.replicas} replica{'s' if plan.replicas > 1 else ''}"
    yield f"{plan.model}: {some} for {plan.rate:,.6g} requests/s with p99 within {plan.slo_p99_ms:g} ms"
    settings = plan.settings
    yield (
        f"  serve each with --max-batch-size {settings.max_batch_size} --max-queue-delay-us "
        f"{settings.max_queue_delay_us} --max-queue-wait-ms {settings.max_queue_wait_ms}"
    )
    if plan.engine:
        yield f"  measured with {plan.instances} instance{'s' if plan.instances > 1 else ''} in {plan.engine}"
    asked = f", {plan.headroom_asked:.0%} requested" if plan.headroom_asked else ""
    yield (
        f"  headroom {plan.headroom:.0%}{asked}: a replica meets the objective up to "
        f"{plan.max_rate_per_replica:,.1f} requests/s"
    )
    yield f"  all up:   {_outcome(plan, plan.with_all)}"
    if plan.with_one_lost is None:
        yield "  one lost: none left"
    else:
        yield f"  one lost: {_outcome(plan, plan.with_one_lost)}"
    if plan.with_one_lost is None or not plan.with_one_lost.met:
        yield f"  {plan.replicas_to_lose_one} replicas meet the objective with one of them lost"
    yield f"  simulated with the server's batcher, from a profile of {plan.server} measured {plan.measured}"
    if check := plan.check:
        yield (
            f"  check, at {check.rate:,.1f} requests/s: p50 measured {check.measured_p50_ms:.2f} ms, simulated "
            f"{check.simulated_p50_ms:.2f} ms; p99 {check.measured_p99_ms:.2f} ms, {check.simulated_p99_ms:.2f} ms"
        )
    for warning in plan.warnings:
        yield f"  warning: {warning}"


def _outcome(plan: Plan, outcome: ReplicaOutcome) -> str:
    if outcome.met:
        verdict = "met"
    else:
        verdict = f"missed, {outcome.within:.1%} within the objective, {outcome.refused:.1%} refused"
    share = outcome.rate / plan.max_rate_per_replica
    return (
        f"{outcome.rate:,.1f} requests/s each, {share:.0%} of its limit: p50 {outcome.p50_ms:.2f} ms, p99 "
        f"{outcome.p99_ms:.2f} ms, batches of {outcome.mean_batch_rows:.1f} rows, engine "
        f"{outcome.engine_busy:.0%} and transport {outcome.transport_busy:.0%} busy: {verdict}"
    )
