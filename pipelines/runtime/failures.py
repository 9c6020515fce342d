"""Errors that PyTorch raises about the machine: what they mean, in one line; leaving other ranks.

They are told apart by their text: torch raises most of them as a plain RuntimeError, and which have
a class of their own depends on its version. Nothing here imports torch, so that commands which need
no device start without it.
"""

import os
import sys
from threading import Thread

MEMORY_ERRORS = (
    "out of memory",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "cublas_status_alloc_failed",
    "unable to find an engine",
)
"""Parts of messages, in lower case: of the allocators of CUDA and MPS, of cuDNN, of cuBLAS, and of
a convolution for which no algorithm of cuDNN could run, mostly because none got its workspace."""
LEAVE_SECONDS = 5.0
"""How long a rank that has failed may take to leave its process group."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device does not suffice.

    cuDNN reports "unable to find an engine" for other reasons as well: whoever retries with less
    and gives up must keep the message.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in MEMORY_ERRORS)


def is_killed_worker(error: BaseException) -> bool:
    """Whether a worker process of a DataLoader was killed.

    Its handler of SIGCHLD raises this in the main thread, at whatever line that is.
    """
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def is_device_error(error: BaseException) -> bool:
    """Whether CUDA or a library on top of it failed, perhaps in a kernel launched long before."""
    text = str(error)
    # torch.AcceleratorError since 2.8; before, and in libraries, a RuntimeError of the same text.
    return isinstance(error, RuntimeError) and ("CUDA error" in text or "cuDNN error" in text)


def is_compile_error(error: BaseException) -> bool:
    """Whether torch.compile failed."""
    dynamo = sys.modules.get("torch._dynamo.exc")
    return dynamo is not None and isinstance(error, dynamo.TorchDynamoException)


def is_distributed_error(error: BaseException) -> bool:
    """Whether a collective failed.

    The store and NCCL's own calls raise torch's DistError; Gloo, inside autograd, a plain
    RuntimeError. NCCL's watchdog raises nothing: it aborts the process.
    """
    distributed = sys.modules.get("torch.distributed")
    known = distributed is not None and isinstance(error, distributed.DistError)
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error))


def describe(error: RuntimeError) -> str | None:
    """One line for the user: the problem and its remedy. None where the error is not known.

    Also None where the user has asked torch for the traceback.
    """
    if is_killed_worker(error):
        return describe_worker(error)
    if is_distributed_error(error):
        return describe_distributed(error)
    if out_of_memory(error):
        return (
            f"the GPU is out of memory ({summary(error)}); end other processes that use it "
            "(nvidia-smi lists them), or use a larger one"
        )
    if is_compile_error(error) and os.environ.get("TORCHDYNAMO_VERBOSE") != "1":
        return (
            f"--compile: torch.compile failed ({summary(error)}); it needs a C++ compiler and the "
            "headers of Python (apt-get install g++ python3-dev): install them, or leave --compile "
            "out; with TORCHDYNAMO_VERBOSE=1 you get the traceback"
        )
    if is_device_error(error) and os.environ.get("CUDA_LAUNCH_BLOCKING") != "1":
        return (
            f"the GPU failed ({summary(error)}); rerun the same command, with "
            "CUDA_LAUNCH_BLOCKING=1 to get the traceback of the operation that fails"
        )
    if "does not have a deterministic implementation" in str(error):
        return f"--deterministic: {summary(error)}; leave it out, or choose other settings"
    return None


def describe_worker(error: RuntimeError) -> str:
    """One line about a worker that was killed."""
    if "shared memory" in str(error):
        return (
            "a data loading worker has died: shared memory (/dev/shm) is full; raise its limit "
            "(docker run --shm-size 8g) or lower --workers, then rerun the same command"
        )
    return (
        f"a data loading worker has died ({summary(error)}); if memory ran out, lower --workers or "
        "give the job more, then rerun the same command"
    )


def describe_distributed(error: RuntimeError) -> str:
    """One line about a collective that failed."""
    what, text = summary(error), str(error).lower()
    if "duplicate gpu" in text:
        return (
            f"two ranks use the same GPU ({what}); start no more processes than there are GPUs "
            "(accelerate launch --num_processes)"
        )
    if "unhandled cuda error" in text or "invalid usage" in text:
        return (
            f"NCCL failed ({what}); rerun with NCCL_DEBUG=WARN, which prints the cause, and check "
            "that every rank has a GPU of its own with free memory"
        )
    late = ", or is late by more than --rank-timeout" if "timed out" in text else ""
    return (
        f"another rank has ended, or cannot be reached{late} ({what}): what it said last is "
        "the cause; then give the same command again"
    )


def summary(error: BaseException) -> str:
    """What a message says first, in one line of at most 200 characters.

    NCCL's own last words follow far behind, after where it failed and in which version.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Last error:" in lines[:-1]:
        lines = lines[lines.index("Last error:") + 1 :]
    first, *more = lines or [type(error).__name__]
    if first.endswith(":") and more:
        first = f"{first} {more[0]}"
    return first[:200]


def leave_process_group(code: int) -> None:
    """Leave the process group of a rank that has failed, or end the process with `code`.

    NCCL warns of a group that was not destroyed, after the line that matters. Destroying it waits
    for what is under way, which a rank that is lost never finishes: the process then ends here,
    without waiting for anything.
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
