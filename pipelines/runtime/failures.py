"""One-line descriptions of errors that PyTorch raises about the machine, and exit of a failed rank.

Errors are recognised by their text: torch raises most of them as plain RuntimeError, and which of
them have a class depends on its version. Nothing here imports torch, so that commands without a
device start quickly.
"""

import errno
import os
import re
import sys
from threading import Thread

MEMORY_ERRORS = (
    "out of memory",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "cublas_status_alloc_failed",
    "unable to find an engine",
)
"""Lower-case substrings of out-of-memory messages: of the CUDA and MPS allocators, cuDNN, cuBLAS,
and of a convolution for which no cuDNN algorithm could allocate its workspace."""
MEMORY_REMEDIES = {
    "train": "lower --crop-size, --global-batch-size or --workers",
    "evaluate": "lower --tile, --batch-size or --workers",
    "predict": "lower --tile, --batch-size or --workers",
    "export": "end other processes",
    "report": "end other processes",
    "unpack": "end other processes",
    "separate": "end other processes",
    "demo": "lower --size",
}
"""What lowers the memory that a verb needs; of the others, the number of processes does."""
LEAVE_SECONDS = 5.0
"""Seconds that a failed rank waits for its process group to be destroyed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device ran out of memory.

    cuDNN also reports "unable to find an engine" for other reasons: callers that retry with less
    memory must include the message when they fail.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in MEMORY_ERRORS)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Return whether this machine, not a GPU, had too little memory for an allocation."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def describe_host_memory(error: BaseException, verb: str) -> str:
    """Return the problem and what lowers the memory that a verb needs, in one line."""
    what = str(error) if isinstance(error, RuntimeError) else ""
    size = re.search(r"allocate (\d+) bytes", what)
    tried = f" ({int(size[1]):,} bytes at once)" if size else ""
    remedy = MEMORY_REMEDIES.get(verb, "lower --workers")
    return f"memory ran out{tried}; {remedy}, or use a machine or job with more memory"


def is_killed_worker(error: BaseException) -> bool:
    """Return whether a DataLoader worker was killed.

    torch's SIGCHLD handler raises the error in the main thread, at any line.
    """
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def is_device_error(error: BaseException) -> bool:
    """Return whether CUDA or a library on it failed, possibly in a kernel launched long before."""
    text = str(error)
    # torch.AcceleratorError since 2.8; a RuntimeError with the same text before, and in libraries.
    return isinstance(error, RuntimeError) and ("CUDA error" in text or "cuDNN error" in text)


def is_compile_error(error: BaseException) -> bool:
    """Return whether torch.compile failed."""
    dynamo = sys.modules.get("torch._dynamo.exc")
    return dynamo is not None and isinstance(error, dynamo.TorchDynamoException)


def is_distributed_error(error: BaseException) -> bool:
    """Return whether a collective failed.

    The store and NCCL raise torch's DistError; Gloo inside autograd raises a plain RuntimeError.
    NCCL's watchdog raises nothing: it aborts the process.
    """
    distributed = sys.modules.get("torch.distributed")
    known = distributed is not None and isinstance(error, distributed.DistError)
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error))


def describe(error: RuntimeError) -> str | None:
    """Return the problem and its remedy in one line; None if the error is unknown.

    Also None if the user enabled torch's own traceback by an environment variable.
    """
    if is_killed_worker(error):
        return describe_worker(error)
    if is_distributed_error(error):
        return describe_distributed(error)
    if is_out_of_memory(error):
        return (
            f"the GPU is out of memory ({summarise_error(error)}); end other processes that use it "
            "(see nvidia-smi), or use a larger GPU"
        )
    if is_compile_error(error) and os.environ.get("TORCHDYNAMO_VERBOSE") != "1":
        return (
            f"--compile: torch.compile failed ({summarise_error(error)}); install a C++ compiler "
            "and the Python headers (apt-get install g++ python3-dev), or run without --compile; "
            "set TORCHDYNAMO_VERBOSE=1 for the traceback"
        )
    if is_device_error(error) and os.environ.get("CUDA_LAUNCH_BLOCKING") != "1":
        return (
            f"the GPU failed ({summarise_error(error)}); rerun the same command; set "
            "CUDA_LAUNCH_BLOCKING=1 for the traceback of the failed operation"
        )
    if "does not have a deterministic implementation" in str(error):
        return f"--deterministic: {summarise_error(error)}; run without it, or change the settings"
    return None


def describe_worker(error: RuntimeError) -> str:
    """Describe a killed worker in one line."""
    if "shared memory" in str(error):
        return (
            "a data loading worker died: shared memory (/dev/shm) is full; raise its limit (docker "
            "run --shm-size 8g) or lower --workers, then rerun the same command"
        )
    return (
        f"a data loading worker died ({summarise_error(error)}); if memory ran out, lower "
        "--workers or raise the job's memory limit, then rerun the same command"
    )


def describe_distributed(error: RuntimeError) -> str:
    """Describe a failed collective in one line."""
    what, text = summarise_error(error), str(error).lower()
    if "duplicate gpu" in text:
        return (
            f"two ranks use the same GPU ({what}); launch at most one process per GPU (accelerate "
            "launch --num_processes)"
        )
    if "unhandled cuda error" in text or "invalid usage" in text:
        return (
            f"NCCL failed ({what}); rerun with NCCL_DEBUG=WARN to see the cause, and check that "
            "every rank has its own GPU with free memory"
        )
    late = ", or did not answer within --rank-timeout" if "timed out" in text else ""
    return (
        f"another rank exited or is unreachable{late} ({what}); see its last message for the "
        "cause, then rerun the same command"
    )


def summarise_error(error: BaseException) -> str:
    """Return the start of an error message, in one line of at most 200 characters.

    For NCCL, the line after `Last error:`, which follows source lines and versions.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Last error:" in lines[:-1]:
        lines = lines[lines.index("Last error:") + 1 :]
    first, *more = lines or [type(error).__name__]
    if first.endswith(":") and more:
        first = f"{first} {more[0]}"
    return first[:200]


def leave_process_group(code: int) -> None:
    """Destroy the process group of a failed rank, or end the process with `code`.

    NCCL prints a warning if the group is not destroyed, after the message that matters. Destroying
    it waits for pending collectives, which a lost rank never completes: after `LEAVE_SECONDS` the
    process exits without cleanup.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.is_initialized():
        return
    leaving = Thread(target=accelerate.PartialState().destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)
    if leaving.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
