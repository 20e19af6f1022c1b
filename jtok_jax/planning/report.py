# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A plan as plain values, as text and as a picture."""

import dataclasses
import pathlib

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import abstract_mesh, check_batches
from jtok_jax.model.attention import fits_cudnn
from jtok_jax.model.placement import describe
from jtok_jax.model.splash import obstacle
from jtok_jax.planning import advice, compiled, traffic
from jtok_jax.planning.cycles import count
from jtok_jax.planning.memory import Memory, memory
from jtok_jax.planning.topology import GIB, Topology
from jtok_jax.store.rows import require_trainable

# XLA takes this share of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_SHARE = 0.75
ROOM = 0.95  # of a device's memory; the rest is the runtime's


def resolved(config: Config, topology: Topology) -> Config:
    """Return `config` with the attention that "auto" comes to on the chips of `topology`."""
    if config.model.attention != "auto":
        return config
    model, length = config.model, config.train.seq_len
    if topology.chip.platform == "gpu":
        fits = fits_cudnn(model.compute_dtype, model.head_size)
    else:
        fits = obstacle(model.compute_dtype, model.head_size, length) is None
    kind = {"gpu": "cudnn", "tpu": "splash"}[topology.chip.platform] if fits else "xla"
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=kind))


def make_plan(config: Config, topology: Topology, *, compile_too: bool = False) -> dict:
    """Return everything the plan says, in bytes, seconds and FLOPs.

    Raises:
        ConfigError: the configuration cannot be cut for the topology; the message has the numbers.
    """
    config = resolved(config, topology)
    mesh = abstract_mesh(config.mesh, topology.devices)
    check_batches(config, mesh)
    require_trainable(config)
    found = memory(config, mesh)
    time = traffic.step_time(config, mesh, topology)
    counts = flops.count(config.model, seq_len=config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len
    plan = {
        "topology": topology.name,
        "chip": topology.chip.kind,
        "devices": topology.devices,
        "hosts": topology.hosts,
        "mesh": describe(config, mesh),
        "memory": _memory(found, topology),
        "flops": {"token": counts.train_flops, "step": counts.train_flops * tokens},
        "tokens_per_step": tokens,
        "collectives": [one._asdict() for one in traffic.collectives(config, mesh)],
        "estimate": {
            "matmul_seconds": time.matmuls,
            "memory_seconds": time.memory,
            "collective_seconds": time.collectives,
            "step_seconds": [time.least, time.most],
            "mfu": [traffic.mfu(config, topology, t) for t in (time.most, time.least)],
            "assumed": {
                "matmuls": traffic.MATMUL_SHARE,
                "memory": traffic.MEMORY_SHARE,
                "links": traffic.LINK_SHARE,
            },
        },
    }
    if rows := traffic.host_rows(config, mesh, topology):
        streamed = config.mesh.table_streaming
        plan["host_tables"] = rows._asdict() | {"hides": rows.hides, "streamed": streamed}
    if not plan["memory"]["fits"]:
        plan["changes_that_fit"] = _changes(config, topology)
        plan["changes_tried"] = advice.tried(config, devices=topology.devices)
    if compile_too:
        plan["compiler"] = _compiled(config, topology)
        total = plan["compiler"]["total"]
        if total is None or total > ROOM * topology.chip.memory:
            plan["memory"]["fits"] = False
    return plan


def _memory(found: Memory, topology: Topology) -> dict:
    chip = topology.chip
    share = GPU_SHARE if chip.platform == "gpu" else 1
    return {
        "parts": [part._asdict() for part in found.parts],
        "state": found.state,
        "step": found.step,
        "total": found.total,
        "device": chip.memory,
        "fits": found.total <= chip.memory * ROOM,
        "share_needed": found.total / chip.memory,
        "default_share": share,
        "checkpoint_host": found.state * topology.devices_per_host,
    }


def _changes(config: Config, topology: Topology) -> list[advice.Change]:
    def fits(candidate: Config) -> bool:
        require_trainable(candidate)
        mesh = abstract_mesh(candidate.mesh, topology.devices)
        check_batches(candidate, mesh)
        return memory(candidate, mesh).total <= topology.chip.memory * ROOM

    return advice.that_fit(config, fits, devices=topology.devices)


def _compiled(config: Config, topology: Topology) -> dict:
    try:
        result = compiled.compile_step(config, topology)
    except compiled.RefusedError as error:
        return {"refused": str(error), "total": None}
    mesh = abstract_mesh(config.mesh, topology.devices)
    predicted = memory(result.config, mesh)
    estimated = count(result.text, num_layers=config.model.num_layers)
    return {
        "stand_in": result.config != config,
        "state": result.state,
        "total": result.total,
        "predicted": predicted.total,
        "predicted_over_compiler": predicted.total / result.total,
        "collectives": result.collectives,
        "cycles": estimated and estimated._asdict(),
    }


def as_text(plan: dict) -> str:
    """Return the plan as a table for people."""
    found, hosts = plan["memory"], plan["devices"] // plan["hosts"]
    of, unit = (GIB, "GiB") if found["total"] >= GIB else (GIB / 1024, "MiB")
    lines = [
        f"{plan['topology']}: {plan['devices']} x {plan['chip']}, {hosts} on each host",
        plan["mesh"],
        "",
        f"{unit:<36}{'a device':>12}{'a host':>12}",
    ]
    row = lambda name, size: f"{name:<36}{size / of:>12.2f}{size * hosts / of:>12.1f}"
    titles = {
        "state": "state (exact)",
        "gradients": "a step (estimate)",
        "residuals": "forward to backward (estimate)",
        "backward": "then the largest of",
        "update": "or, when all that was kept is gone",
    }
    for when, title in titles.items():
        lines.append(title)
        lines += [row(f"  {p['name']}", p["size"]) for p in found["parts"] if p["when"] == when]
    lines += [row("total", found["total"]), _verdict(plan)]
    lines.append(
        f"a save copies at most {found['checkpoint_host'] / of:.1f} {unit} into a host's memory"
    )
    if "compiler" in plan:
        lines += ["", *_compiler_lines(plan["compiler"])]
    lines += ["", *_change_lines(plan), *_host_lines(plan), *_time_lines(plan)]
    return "\n".join(lines)


def _verdict(plan: dict) -> str:
    found = plan["memory"]
    share, have = found["share_needed"], found["device"] / GIB
    if not found["fits"] and found["total"] <= ROOM * found["device"]:
        return f"DOES NOT FIT, says the compiler; predicted: {100 * share:.0f}% of {have:.2f} GiB"
    if not found["fits"]:
        largest = sorted(found["parts"], key=lambda part: -part["size"])[:3]
        names = ", ".join(f"{part['name']} {part['size'] / GIB:.1f}" for part in largest)
        return f"DOES NOT FIT: {100 * share:.0f}% of {have:.2f} GiB. Largest, in GiB: {names}"
    text = f"fits: {100 * share:.0f}% of {have:.2f} GiB"
    if share > found["default_share"] * 0.95:
        text += f"; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, the default is {GPU_SHARE}"
    return text


def _compiler_lines(found: dict) -> list[str]:
    if "refused" in found:
        return [f"compiler: DOES NOT FIT. {found['refused']}"]
    sizes = [found[name] / GIB for name in ("total", "state", "predicted")]
    lines = [
        "compiler: {:.2f} GiB, {:.2f} of them state; predicted {:.2f}".format(*sizes)
        + f", {found['predicted_over_compiler']:.2f} of it",
        "collectives in its text: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(found["collectives"].items())),
    ]
    if found["stand_in"]:
        lines.append("  both with model.attention=chunked: cuDNN cannot be compiled for without it")
    return [*lines, *_cycle_lines(found["cycles"])]


def _cycle_lines(found: dict | None) -> list[str]:
    if not found:
        return ["cycles: the compiler for GPUs states none"]
    kinds = {name: cycles for name, cycles in found["by_kind"].items() if cycles}
    total = sum(kinds.values()) / 1e6
    parts = ", ".join(f"{name} {cycles / 1e6:,.1f}" for name, cycles in kinds.items())
    lines = [
        f"its estimate of a step: {total:,.1f} million cycles ({parts})",
        f"  left out: {found['kernels']:,} runs of Pallas kernels, {found['unknown']:,} of fusions "
        "without an estimate, waits for collectives",
        "  nothing was run: it can be compared with another estimate, not with a clock",
    ]
    if found["loops"]:
        lines.append(f"  too low: {found['loops']} loops of unknown length count once")
    return lines


def _change_lines(plan: dict) -> list[str]:
    if "changes_that_fit" not in plan:
        return []
    changes = plan["changes_that_fit"]
    if not changes:
        return [
            f"Nothing tried fits, up to three at a time of {', '.join(plan['changes_tried'])}. Not "
            "tried: mesh.expert, mesh.tensor, mesh.table_columns, other sizes of a step or model. "
            "Else take more or larger chips.",
            "",
        ]
    lines = ["Any of these would fit:"]
    for change in changes:
        other = "  (another training)" if {*advice.OTHER_RUN} & change.keys() else ""
        lines.append("  " + " ".join(f"--config.{k}={v}" for k, v in change.items()) + other)
    return [*lines, ""]


def _host_lines(plan: dict) -> list[str]:
    found = plan.get("host_tables")
    if not found:
        return []
    lines = [
        f"a host holds {found['host'] / GIB:.2f} GiB of tables with their optimizer's state; of "
        f"these a step moves at most {found['each_way'] / GIB:.3f} GiB to a device, and back",
        f"  behind a step that needs {found['rate'] / 1e9:.1f} GB/s each way",
    ]
    if not found["link"]:
        lines[-1] += "; what a host and this chip exchange is not stated"
    else:
        link = f"{found['link'] / 1e9:.0f} GB/s at {100 * traffic.LINK_SHARE:.0f}%"
        lines[-1] += f"; of {link}: {'hidden' if found['hides'] else 'NOT hidden'}"
        size = found["batch_size"]
        lines.append(f"  hidden {f'from train.batch_size={size} on' if size else 'at no batch'}")
    if 2 * found["each_way"] > found["of_device"] and not found["streamed"]:
        lines.append(
            "  a step may read most rows: on the device tables take less. Set train.max_unique_ids "
            "if batches have fewer different tokens, or take smaller ones"
        )
    return [*lines, ""]


def _time_lines(plan: dict) -> list[str]:
    estimate = plan["estimate"]
    low, high = estimate["step_seconds"]
    lines = ["a device sends in a step, GiB"] if plan["collectives"] else []
    space = [""] if plan["collectives"] else []
    for one in plan["collectives"]:
        name = f"  {one['name']}, {one['kind']} over {' x '.join(one['axes'])}"
        lines.append(f"{name:<60} {one['size'] / GIB:>10.3f}")
    shares = ", ".join(f"{name} {100 * v:.0f}%" for name, v in estimate["assumed"].items())
    lines += [
        *space,
        f"{plan['flops']['step']:.3e} FLOPs a step of {plan['tokens_per_step']:,} tokens",
        f"ESTIMATE at assumed shares of stated rates ({shares}):",
        f"  matmuls {_time(estimate['matmul_seconds'])}, rows, loss, optimizer "
        f"{_time(estimate['memory_seconds'])}, collectives {_time(estimate['collective_seconds'])}",
        f"  a step {_time(low)} with all collectives hidden to {_time(high)} with none; "
        f"MFU (of bfloat16) {100 * estimate['mfu'][1]:.0f}% to {100 * estimate['mfu'][0]:.0f}%",
    ]
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def draw(plan: dict, path: pathlib.Path) -> None:
    """Draw bars of what a device holds; needs matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; pip install -e '.[plot]'.") from error
    parts = plan["memory"]["parts"]
    colours = {
        "state": "#33608c", "gradients": "#5a9a6f", "residuals": "#c98b2b", "backward": "#a8a8a8",
        "update": "#d9d9d9",
    }  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(parts) + 1.6))
    for when, colour in colours.items():
        mine = [(i, p["size"] / GIB) for i, p in enumerate(parts) if p["when"] == when]
        axes.barh([i for i, _ in mine], [size for _, size in mine], color=colour, label=when)
    axes.set_yticks(range(len(parts)), [part["name"] for part in parts])
    axes.invert_yaxis()
    total, have = plan["memory"]["total"] / GIB, plan["memory"]["device"] / GIB
    axes.set_xlabel("GiB a device")
    axes.set_title(f"{plan['topology']}: {total:.1f} of {have:.1f} GiB", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    try:
        figure.savefig(path, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot={path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
