"""One network, two runtimes: a torch module becomes a function from arrays to arrays, run by torch or by OpenVINO.

OpenVINO is many times faster on a CPU and needs no torch once the network was converted: the conversion happens in
memory and is kept in the user's cache folder, so that later starts only read it. torch is imported when needed only.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import platformdirs

from ibisagent.errors import ConfigError, DataError, SegmenterError
from ibisagent.files import appearing_whole, one_line

if TYPE_CHECKING:
    from torch import nn

Runtime = Literal["torch", "openvino"]
RUNTIMES = ("auto", "torch", "openvino")

log = logging.getLogger(__name__)

# OpenVINO's converter reports its use over the network, unasked, by forked processes; without this package it does not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


_one_thread: ContextVar[bool] = ContextVar("one_thread", default=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenVINO networks loaded in this block run on one thread: sums of multiple threads differ in their last bits, and
    so do masks. For runs that must end the same on any machine and with any number of workers."""
    token = _one_thread.set(True)
    try:
        yield
    finally:
        _one_thread.reset(token)


class Network(Protocol):
    """A network without its framework: float32 arrays in, float32 arrays out, same input same output."""

    @property
    def runtime(self) -> str:
        """What runs it, for records: "openvino 2026.4.1 f32", "torch 2.15.0 cuda"."""
        ...

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run once. Thread-safe. Raises SegmenterError when the runtime fails."""
        ...


def choose_device(device: str) -> str:
    """A torch device name; "auto" is "cuda" where torch sees one, else "cpu" (torch is not loaded to find no GPU)."""
    if device != "auto":
        if device.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ConfigError(f"unknown device '{device}': give auto, cpu, cuda, cuda:<number> or mps")
        return device
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_runtime(runtime: str, device: str) -> Runtime:
    """The runtime; "auto" is OpenVINO on the CPU where it is installed, else torch. ConfigError for one not there."""
    if runtime not in RUNTIMES:
        raise ConfigError(f"unknown runtime '{runtime}': give {', '.join(RUNTIMES)}")
    installed = importlib.util.find_spec("openvino") is not None
    if runtime == "openvino" and device != "cpu":
        raise ConfigError(f"runtime openvino runs on the cpu, not on '{device}': give device cpu or runtime torch")
    if runtime == "openvino" and not installed:
        raise ConfigError("runtime openvino is not installed: pip install openvino, or give runtime torch")
    if runtime == "auto":
        return "openvino" if installed and device == "cpu" else "torch"
    return cast(Runtime, runtime)


def load_network(
    build: Callable[[], nn.Module],
    example: Sequence[np.ndarray],
    *,
    key: str,
    runtime: Runtime,
    device: str,
    exact: bool = True,
    batched: bool = False,
) -> Network:
    """The network that `build` makes, ready to run.

    build: makes the module with its weights; not called where a conversion is cached. example: one array per input;
    the inputs keep these shapes. key: names the conversion in the cache: it must change whenever the weights or the
    code of the module do. exact: False allows OpenVINO bfloat16 where the CPU has no float16: about twice as fast,
    for networks that were trained on such numbers. batched: the first axis of all arrays is a batch and may have any
    length; OpenVINO then takes row after row, as a batch gains nothing on a CPU.
    """
    if runtime == "torch":
        return TorchNetwork(build(), device)
    return _OpenVinoNetwork(build, example, key, exact, batched)


class TorchNetwork:
    """Runs a module with torch, float32."""

    def __init__(self, module: nn.Module, device: str) -> None:
        import torch

        try:
            self._module = module.eval().requires_grad_(False).to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise SegmenterError(
                f"device '{device}' cannot be used: {one_line(error, 300)}; give device cpu"
            ) from error
        self._device = device
        self.runtime = f"torch {torch.__version__} {device}"

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """See `Network`."""
        import torch

        try:
            with torch.inference_mode():
                outputs = self._module(*(torch.tensor(array, device=self._device) for array in arrays))
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                return tuple(output.float().cpu().numpy() for output in outputs)
        except RuntimeError as error:
            raise SegmenterError(f"torch failed on '{self._device}': {one_line(error, 300)}") from error


class _OpenVinoNetwork:
    """Runs a converted module with OpenVINO on the CPU: weights in float16, arithmetic too where the CPU can do it."""

    def __init__(
        self, build: Callable[[], nn.Module], example: Sequence[np.ndarray], key: str, exact: bool, batched: bool
    ) -> None:
        import openvino

        core = openvino.Core()
        # An explicit hint: without one, and for "f16" on a CPU that lacks it, OpenVINO takes bfloat16 where the CPU has
        # that, and its 8 bits of mantissa move mask borders (relative error of the features 0.045, of float16 0.003).
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        lossy = "bf16" if "BF16" in able and not exact else "f32"
        precision = "f16" if "FP16" in able else lossy
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "ENABLE_CPU_PINNING": False,  # multiple processes would all pin their threads to the first cores
        }
        # OpenVINO has its own thread pool; the user's wish for torch and numpy holds for it as well.
        if _one_thread.get():
            settings["INFERENCE_NUM_THREADS"] = 1
        elif os.environ.get("OMP_NUM_THREADS", "").isdigit():
            settings["INFERENCE_NUM_THREADS"] = int(os.environ["OMP_NUM_THREADS"])
        version = openvino.__version__.split("-")[0]
        self.runtime = f"openvino {version} {precision}"
        folder = conversion_folder() / f"{key}-openvino{version}"
        if not folder.exists():
            folder = _convert(build, example, folder)
        try:
            self._compiled = _compiled(core, folder, settings)
        except RuntimeError as error:
            raise SegmenterError(f"{folder}: OpenVINO cannot read it ({one_line(error, 300)}): delete it") from error
        finally:
            if folder.parent != conversion_folder():
                shutil.rmtree(folder, ignore_errors=True)
        self._request = self._compiled.create_infer_request()
        self._lock = threading.Lock()
        self._batched = batched

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        if not self._batched:
            return self._run(arrays)
        rows = [self._run([array[index : index + 1] for array in arrays]) for index in range(len(arrays[0]))]
        return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))

    def _run(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        with self._lock:
            try:
                outputs = self._request.infer(list(arrays))
            except RuntimeError as error:
                raise SegmenterError(f"OpenVINO failed: {one_line(error, 300)}") from error
            return tuple(np.array(output, dtype=np.float32) for output in outputs.values())


def _compiled(core: Any, folder: Path, settings: Mapping[str, Any]) -> Any:
    """The network in `folder` for this CPU: as an earlier start left it there, which takes half the time, or anew.

    RuntimeError where it cannot be read.
    """
    cpu = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    made_for = hashlib.sha256(repr([*cpu, settings["INFERENCE_PRECISION_HINT"]]).encode()).hexdigest()
    kept = folder / f"compiled-{made_for[:16]}.blob"
    try:
        return core.import_model(io.BytesIO(kept.read_bytes()), "CPU", settings)
    except OSError:
        pass  # the first start on this CPU
    except RuntimeError as error:
        log.info("%s: made anew, OpenVINO cannot read it (%s)", kept, one_line(error, 200))
    compiled = core.compile_model(core.read_model(folder / "network.xml"), "CPU", settings)
    try:
        with appearing_whole(kept) as part:
            part.write_bytes(compiled.export_model().getvalue())
    except DataError as error:
        log.info("%s: every start compiles the network", error)
    return compiled


def conversion_folder() -> Path:
    """Where converted networks are kept between starts; safe to delete at any time."""
    return Path(platformdirs.user_cache_dir("ibisagent")) / "openvino"


def _convert(build: Callable[[], nn.Module], example: Sequence[np.ndarray], folder: Path) -> Path:
    """Convert and store under `folder`, whole or not at all; returns where it lies (a throw-away folder if need be)."""
    import openvino
    import torch

    module = build().eval().requires_grad_(False)
    exported = torch.export.export(module, tuple(torch.tensor(array) for array in example))
    model = openvino.convert_model(exported)
    model.reshape({port: list(array.shape) for port, array in zip(model.inputs, example, strict=True)})
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError as error:
        log.warning("%s cannot be written (%s): every start converts the network again", folder.parent, error)
        folder = Path(tempfile.gettempdir()) / "no-cache" / folder.name
        fresh = Path(tempfile.mkdtemp(prefix="ibisagent-"))
    try:
        openvino.save_model(model, fresh / "network.xml", compress_to_fp16=True)
    except RuntimeError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise SegmenterError(f"{fresh}: cannot store the converted network ({one_line(error, 300)})") from error
    if folder.parent != conversion_folder():
        return fresh
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(fresh, ignore_errors=True)  # another process was faster; both are the same
    return folder
