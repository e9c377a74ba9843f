"""The studio: look, redraw, review and read in a browser; the command that starts it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from counterstain.api import PathLike, Settings, open_cohort, verb
from counterstain.errors import ConfigError, InputError

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort

PASSWORD_VARIABLE = "COUNTERSTAIN_STUDIO_PASSWORD"  # noqa: S105 - where it is, not what


@verb
def studio(
    cohort: PathLike | Cohort,
    *,
    generator: Sequence[PathLike] = (),
    judge: PathLike | None = None,
    keep_in: PathLike | None = None,
    set_dir: PathLike | None = None,
    audit: PathLike | None = None,
    reading_test: PathLike | None = None,
    study: PathLike | None = None,
    size_px: int | None = None,
    settings: Settings | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
) -> None:
    """Open the studio in a browser: redraw instances, review a synthetic set, take a blind test, compare arms.

    It answers on this machine alone, and asks nothing of any other. Ctrl-C ends it.

    Parameters
    ----------
    cohort : str, Path or Cohort
        Folder of the cohort.
    generator : sequence of str or Path
        Checkpoints to draw with; each can be drawn with in all its ways. Phantoms have the oracle as well.
    judge : str or Path, optional
        Judge that says what instances look like, before and after, and which patches to review look as asked.
    keep_in : str or Path, optional
        Folder of a set that redrawn patches can be added to; made where there is none.
    set_dir : str or Path, optional
        Synthetic set to review.
    audit : str or Path, optional
        Folder of an audit of that set: near copies of training tissue then come first.
    reading_test : str or Path, optional
        Blind reading test to take.
    study : str or Path, optional
        Folder of a study that has run, to compare its arms region by region.
    size_px : int, optional
        Edge of the patches [default: as the first checkpoint].
    settings : mapping or sequence of str, optional
        A change of how images are drawn, for example diffusion.sampler.steps=16.
    host : str
        Address to answer on; another than this machine's own needs --auth.
    port : int
        Port to answer on; 0 = any that is free.
    auth : str, optional
        User that has to log in, with the password in the environment variable COUNTERSTAIN_STUDIO_PASSWORD, or typed.
    """
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ConfigError("the studio needs Gradio; run: pip install 'counterstain[app]'")
    if not _is_this_machine(host) and not auth:
        raise ConfigError(f"--host {host}: others could open the studio there; give --auth USER with it")
    users = {auth: _password(auth)} if auth else {}
    with _listening(host, port) as listener:
        from counterstain.app.server import Studio, page, serve

        places = {"keep_in": keep_in, "set_dir": set_dir, "audit": audit, "reading_test": reading_test, "study": study}
        opened = page(
            Studio.open(
                open_cohort(cohort),
                generators=generator,
                size_px=size_px,
                settings=settings,
                judge=judge,
                **{name: None if place is None else Path(place) for name, place in places.items()},
            )
        )
        address = f"http://{'[' + host + ']' if ':' in host else host}:{listener.getsockname()[1]}"
        sys.stderr.write(f"the studio is open at {address}\nCtrl-C ends it\n")
        serve(opened, listener, host=host, users=users)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a port; InputError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port}: expected 0 to {2**16 - 1}")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be opened ({error.strerror}); give another, or --port 0"
        ) from error
    with listener:
        listener.listen()
        yield listener


def _is_this_machine(host: str) -> bool:
    from ipaddress import ip_address

    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _password(user: str) -> str:
    """Return the password of a user: from the environment, or typed."""
    from getpass import getpass

    password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password and sys.stdin.isatty():
        password = getpass(f"Password of {user}: ")
    if not password:
        raise ConfigError(f"--auth {user}: no password; set {PASSWORD_VARIABLE}")
    return password
