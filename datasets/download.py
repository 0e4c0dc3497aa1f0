"""Official archives, downloaded: what arrives is checked, and only then gets its name."""

import os
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pooch
import requests
from tqdm import tqdm

from datasets import DataError, Say, sources

PATIENCE_S = 8.0  # until a site that does not answer, or a connection on which nothing arrives, is given up


def missing(name: str, places: list[Path], why: str) -> str:
    """A message of two lines: why the named set is not in any of the places, and how to supply it."""
    archive, looked = sources.SETS[name].url.rpartition("/")[2], ", ".join(map(str, places))
    looked += "".join(f" ({folder} is there and empty)" for folder in sources.empty_folders(name, places))
    return (
        f"{name} {why}; looked in {looked}.\n"
        f"Give --data-dir FOLDER, with {archive} or what it unpacks to in it, or "
        "--data FOLDER (train/<class>/*, test/<class>/*), or --data synthetic"
    )


def fetch(name: str, places: list[Path], say: Say) -> None:
    """Download a named set's archive into the last place, on which the lock is held. Raises DataError."""
    url = sources.SETS[name].url
    file = places[-1] / url.rpartition("/")[2]
    if file.is_file():  # another process has fetched it by now
        return
    unfinished = file.with_name(f"{file.name}.download")
    say(f"downloading {url} to {file}")
    pooch.get_logger().setLevel("WARNING")  # the line above says what pooch would
    try:
        _wait_for_an_answer(url)
        # pooch sets the total once it is known, and takes a bar whose total is 0 or None for no bar.
        with tqdm(desc=file.name, total=1, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            get = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=PATIENCE_S)
            checksum = f"md5:{sources.SETS[name].archives[file.name]}"
            pooch.retrieve(url, checksum, file.name, unfinished, downloader=get)
        (unfinished / file.name).chmod(0o644)  # pooch leaves it readable by its owner alone
        os.replace(unfinished / file.name, file)
    except (OSError, ValueError) as error:  # pooch reports a wrong checksum as a ValueError
        why = f"came from {url} with a wrong checksum and was removed"
        if isinstance(error, OSError):
            lost = isinstance(error, requests.exceptions.ConnectionError)  # whose text is urllib3's, and long
            why = f"no connection to {url.split('/')[2]}" if lost else sources.brief(error)
            why = f"cannot be downloaded ({why})"
        raise DataError(missing(name, places, why)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # also what a killed download has left there


def _wait_for_an_answer(url: str) -> None:
    """Raise TimeoutError if none comes in time, even while the name is looked up, which no timeout ends."""
    ask = pooch.HTTPDownloader(timeout=2 * PATIENCE_S)
    with ThreadPool(1) as pool:  # of daemons: one that hangs is left behind
        answer = pool.apply_async(ask, (url, None, None), {"check_only": True})
        answer.wait(PATIENCE_S)  # and not get(): the download meets the same error, and reports it
    if not answer.ready():
        raise TimeoutError(f"no answer within {PATIENCE_S:g} s")
