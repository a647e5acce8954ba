"Answers to the exercises of `24_package`, right and wrong ones; `test_package.py` runs them."

import hashlib


def _hash(data):
    return hashlib.sha256(data).hexdigest()


def sorted_names(manifest, disk):
    "Right: what is missing or has another hash"
    return sorted(f for f, said in manifest.items() if f not in disk or _hash(disk[f]) != said)


def with_get(manifest, disk):
    "Right: a file that is missing has no hash that a manifest could hold"
    hashes = {f: _hash(data) for f, data in disk.items()}
    return sorted(f for f in manifest if hashes.get(f) != manifest[f])


def only_wrong(manifest, disk):
    "Wrong: a missing file is no suspect"
    return sorted(f for f in manifest if f in disk and _hash(disk[f]) != manifest[f])


def only_missing(manifest, disk):
    "Wrong: never looks into a file"
    return sorted(manifest.keys() - disk.keys())


def strangers_too(manifest, disk):
    "Wrong: a file that nobody listed is a suspect"
    hashes = {f: _hash(data) for f, data in disk.items()}
    return sorted(f for f in manifest | disk if hashes.get(f) != manifest.get(f))


def by_all_hashes(manifest, disk):
    "Wrong: two files that were exchanged have the right hashes, at the wrong names"
    there = set(map(_hash, disk.values()))
    return sorted(f for f, said in manifest.items() if said not in there)


RIGHT = [sorted_names, with_get]
WRONG = [only_wrong, only_missing, strangers_too, by_all_hashes]


def all_but_the_card():
    "Right: a card is for people, and people may improve it"
    return False, False, False, True


def the_manifest_may_change():
    "Wrong: the manifest holds a hash of itself"
    return False, False, True, True


def nothing_may_change():
    "Wrong: the card may"
    return False, False, False, False


RIGHT_GUESSES = [all_but_the_card]
WRONG_GUESSES = [the_manifest_may_change, nothing_may_change]

ANSWERS = dict(
    suspects=(RIGHT, WRONG),
    my_guess=(RIGHT_GUESSES, WRONG_GUESSES),
)
