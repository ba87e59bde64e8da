"""Describe a cluster: nodes, GPUs and the links between them, as the options of `vineppo plan --cluster` name them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vineppo.config.messages import did_you_mean
from vineppo.plan.datasheet import GPUS, Gpu
from vineppo.plan.shape import GIB
from vineppo.types import UserError

KINDS = {
    **GPUS,
    "a100-40gb": Gpu(312e12, 1.555e12, 40 * GIB),
    "a100-80gb": GPUS["a100"],
    "h100-80gb": GPUS["h100"],
    "h200-141gb": GPUS["h200"],
}
"""The GPUs that a cluster may have, by name: those of `--gpu`, and names that also say how much memory they have."""

NVLINK = {"a100": 600e9, "h100": 900e9, "h200": 900e9, "t4": 32e9}
"""First part of a GPU's name -> bytes per second between this GPU and the others of its node, both directions together,
from the data sheets: NVLink of the SXM forms; PCIe 3.0 for the T4."""
PCIE = 64e9
"""The same for the other GPUs, which have no NVLink: PCIe 4.0 with 16 lanes."""
NICS = {"a100": 200e9 / 8, "h100": 400e9 / 8, "h200": 400e9 / 8}
"""First part of a GPU's name -> bytes per second and direction of the network adapter that each GPU has in NVIDIA's
DGX A100, H100 and H200 (ConnectX-6 and ConnectX-7)."""
ETHERNET = 25e9 / 8
"""Bytes per second and direction of a node with other GPUs: Ethernet with 25 Gbit/s (assumed)."""

_UNITS = {"gb": 1e9, "tb": 1e12, "gbit": 1e9 / 8, "tbit": 1e12 / 8}
"""Unit in `--links` -> bytes per second."""
_OWN_UNIT = {"nvlink": "gb", "network": "gbit"}
"""Name of a link -> unit of a number without one."""


@dataclass(frozen=True)
class Links:
    """Speeds of the links of a cluster."""

    nvlink: float
    """Bytes per second between a GPU and the others of its node, both directions together, as data sheets give it. Also
    for GPUs that are connected by PCIe."""
    network: float
    """Bytes per second of a node's network, one direction, all adapters of the node together."""
    given: frozenset[str] = frozenset()
    """Names of the links whose speed the user gave; the others are defaults."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes with equal GPUs."""

    name: str
    """What the user typed, such as `1x8xh100-80gb`."""
    nodes: int
    """Number of nodes."""
    per_node: int
    """Number of GPUs in a node."""
    gpu: Gpu
    """Speed and memory of one GPU."""
    links: Links
    """Speeds of the links."""

    @property
    def ranks(self) -> int:
        """Number of GPUs, which is the number of processes that train."""
        return self.nodes * self.per_node


def cluster_of(name: str, links: str | None = None) -> Cluster:
    """Return the cluster with a name such as `1x8xh100-80gb`: nodes, GPUs of a node, kind of the GPUs.

    Args:
        name: the option `--cluster`.
        links: the option `--links`, such as `nvlink=900,network=3200gbit`; None uses the defaults of the kind.
    Raises:
        UserError: if one of the two is not of this form, or names an unknown kind of GPU, link or unit.
    """
    name = name.strip().lower()
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([a-z0-9-]+)", name)
    if not match:
        raise UserError(
            f"--cluster is {name!r}; give NODESxGPUSxKIND with whole numbers from 1, for example 1x8xh100-80gb for one "
            "node with eight GPUs"
        )
    nodes, per_node, kind = int(match[1]), int(match[2]), match[3]
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise UserError(
            f"unknown GPU {kind} in --cluster {name}; {hint + ' ' if hint else ''}allowed: {', '.join(KINDS)}"
        )
    family = kind.partition("-")[0]
    adapters = NICS[family] * per_node if family in NICS else ETHERNET
    return Cluster(
        name, nodes, per_node, KINDS[kind], _with_given(Links(NVLINK.get(family, PCIE), adapters), links or "")
    )


def _with_given(defaults: Links, text: str) -> Links:
    """Return the links with the speeds that the option `--links` gives.

    Raises:
        UserError: if an entry is not of the form LINK=NUMBER or LINK=NUMBERunit.
    """
    speeds = dict[str, float]()
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)=(\d+(?:\.\d*)?)\s*(\w*)\s*", entry.lower())
        unit = match and (match[3] or _OWN_UNIT.get(match[1], ""))
        if not match or match[1] not in _OWN_UNIT or unit not in _UNITS or float(match[2]) == 0 or match[1] in speeds:
            raise UserError(
                f"--links has the entry {entry!r}; give nvlink=NUMBER (GB/s of a GPU, both directions together) or "
                "network=NUMBER (Gbit/s of a node), each once, above 0, with a unit (gb, tb, gbit, tbit) if it is "
                "another, for example nvlink=900,network=3200gbit"
            )
        speeds[match[1]] = float(match[2]) * _UNITS[unit]
    return Links(speeds.get("nvlink", defaults.nvlink), speeds.get("network", defaults.network), frozenset(speeds))
