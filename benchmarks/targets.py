"""Accelerators that this machine need not have: their compilers run anywhere, and plan what a program would take there.

The compiler for NVIDIA GPUs comes with JAX's plugin, the one for TPUs with libtpu. Both are fetched from the package
index, into folders of their own, so that JAX finds them only where they are asked for. Nothing is run on a device, and
no speed is measured.
"""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rich_click as click

DEVICES = 8
# What XLA asks to know of a GPU: figures of the H100 SXM.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# The packages, and what describes eight devices of one host.
TARGETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    'NVIDIA H100': (
        # The last has NVIDIA's library of exp, erf and the like.
        ('jax-cuda13-plugin=={jax}', 'jax-cuda13-pjrt=={jax}', 'nvidia-nvvm>=13'),
        {'platform': 'cuda', 'target_config': H100, 'topology': f'1x1x{DEVICES}'},
    ),
    'TPU v5e': (('libtpu',), {'platform': 'tpu', 'topology_name': 'v5e:2x4'}),
}


def devices(target: str, folder: Path) -> list[Any]:
    """Eight devices of a target, to compile for; its compiler is in `folder` or comes there. Before jax is imported.

    Raises ClickException when the compiler cannot be fetched.
    """
    packages, description = TARGETS[target]
    version = importlib.metadata.version('jax')
    place = folder / f'{description["platform"]}-compiler-for-jax-{version}'
    if not place.exists():
        fetch(packages, version, place)
    sys.path.append(str(place))
    # The CPU stays the device for all else; libtpu is told where it is, instead of asking around.
    os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost')
    os.environ.update(TPU_ACCELERATOR_TYPE=f'v5litepod-{DEVICES}', TPU_WORKER_ID='0')
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # another process may compile, too: there is no device to share
    # Which kernels of XLA's own are best, it would try out on the GPU; NVIDIA's library multiplies without that.
    flags = '--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(**description).devices)


def fetch(packages: tuple[str, ...], version: str, place: Path) -> None:
    """The releases that this version of jax goes with, without what they need to run."""
    required = [line.split(';')[0] for line in importlib.metadata.requires('jax') or ()]
    named = [
        next((line for line in required if line.startswith(package)), package.format(jax=version))
        for package in packages
    ]
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', f'{folder}/{place.name}']
        ended = subprocess.run([*pip, *named], capture_output=True, text=True, check=False)
        if ended.returncode:
            raise click.ClickException(f'{" and ".join(named)} could not be fetched.\n{ended.stderr}')
        Path(folder, place.name).rename(place)
