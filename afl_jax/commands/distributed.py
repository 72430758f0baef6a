"""A command as one of several processes: none of them may be left waiting for another."""

import os
import sys
from collections.abc import Callable

import jax

from afl_jax import parallel
from afl_jax.errors import InputError, print_error
from afl_jax.signals import Interrupted


def run_distributed(work: Callable[[], int]) -> int:
    """Joins the processes of a run and does this one's part.

    An error ends this process at once, and so the others: JAX's orderly end would wait minutes for
    processes that themselves wait for this one.

    Args:
        work: Returns the exit code.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If the processes cannot be joined.
        Interrupted: If all processes came to an end in order.
    """
    say_goodbye = parallel.start_processes()
    try:
        code = work()
    except (InputError, OSError) as error:
        print_error(error)
        code = 2
    except Interrupted as interruption:
        if interruption.place:
            raise
        print_error(interruption)
        code = interruption.exit_code
    except jax.errors.JaxRuntimeError as error:
        # What a collective operation says depends on what connects the devices.
        reason = str(error).strip().splitlines()[0]
        print_error(
            f"process {jax.process_index()} of {jax.process_count()}: another process is gone, or "
            f"a device failed ({reason[:300]}); go on from the last checkpoint with --resume."
        )
        code = 1
    finally:
        say_goodbye()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
