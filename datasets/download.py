"""Download official archives; a file gets its name only once its checksum has been verified."""

import os
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pooch
import requests
from tqdm import tqdm

from datasets import DataError, Say, sources

PATIENCE_S = 8.0  # time limit for a site that does not answer, or a connection that stalls


def missing(name: str, places: list[Path], why: str) -> str:
    """Return a two-line message: why the named set is in none of the places, and how to supply it."""
    archive, looked = sources.SETS[name].url.rpartition("/")[2], ", ".join(map(str, places))
    looked += "".join(f" ({folder} is there and empty)" for folder in sources.empty_folders(name, places))
    return (
        f"{name} {why}; looked in {looked}.\n"
        f"Give --data-dir FOLDER, with {archive} or what it unpacks to in it, or "
        "--data FOLDER (train/<class>/*, test/<class>/*), or --data synthetic"
    )


def fetch(name: str, places: list[Path], say: Say) -> None:
    """Download a named set's archive into the last place, while the caller holds the lock.

    Raises DataError if the download fails or its checksum is wrong.
    """
    url = sources.SETS[name].url
    file = places[-1] / url.rpartition("/")[2]
    if file.is_file():  # another process has already fetched it
        return
    unfinished = file.with_name(f"{file.name}.download")
    say(f"downloading {url} to {file}")
    pooch.get_logger().setLevel("WARNING")  # the note above replaces pooch's own
    try:
        _wait_for_an_answer(url)
        # pooch ignores a bar whose total is 0 or None, and sets the total once it is known.
        with tqdm(desc=file.name, total=1, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            get = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=PATIENCE_S)
            checksum = f"md5:{sources.SETS[name].archives[file.name]}"
            pooch.retrieve(url, checksum, file.name, unfinished, downloader=get)
        (unfinished / file.name).chmod(0o644)  # pooch makes it readable only by its owner
        os.replace(unfinished / file.name, file)
    except (OSError, ValueError) as error:  # pooch reports a wrong checksum as a ValueError
        why = f"came from {url} with a wrong checksum and was removed"
        if isinstance(error, OSError):
            lost = isinstance(error, requests.exceptions.ConnectionError)  # its text is urllib3's, and long
            why = f"no connection to {url.split('/')[2]}" if lost else sources.brief(error)
            why = f"cannot be downloaded ({why})"
        raise DataError(missing(name, places, why)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # including what a killed download left


def _wait_for_an_answer(url: str) -> None:
    """Raise TimeoutError if no answer comes in time, even during the name look-up, which has no timeout."""
    ask = pooch.HTTPDownloader(timeout=2 * PATIENCE_S)
    with ThreadPool(1) as pool:  # a daemon thread: if it hangs, it is left behind
        answer = pool.apply_async(ask, (url, None, None), {"check_only": True})
        answer.wait(PATIENCE_S)  # not get(), as the download will report any error
    if not answer.ready():
        raise TimeoutError(f"no answer within {PATIENCE_S:g} s")
