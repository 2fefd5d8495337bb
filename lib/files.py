"""Files: read with a clear error, written whole or not at all."""

from contextlib import contextmanager
import gzip
import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.errors import UserError


@contextmanager
def reading(place):
    """Any error inside becomes a UserError that names the place: a file, or a line of it."""
    try:
        yield
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"{place}: {e} is missing") from None
    except Exception as e:
        what = getattr(e, "strerror", None) or f"{type(e).__name__}: {str(e)[:300]}"
        raise UserError(f"{place}: cannot be read ({what})") from None


@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, and renames it to `path` at the end.

    On an error the temporary file is removed and `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be written ({e}); free some space, say") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def json_object(text):
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # and no half a character
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_json(path):
    with reading(path):
        return json_object(Path(path).read_bytes())


def read_jsonl(path):
    """The objects of a .jsonl or .jsonl.gz file, each with its place as "_place".

    Blank lines are skipped. Raises UserError with file and line.
    """
    with reading(path), (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        lines = []
        for number, line in enumerate(file, 1):
            with reading(place := f"{path}, line {number}"):
                if line.strip():
                    lines.append(json_object(line) | {"_place": place})
    if not lines:
        raise UserError(f"{path}: the file is empty")
    return lines


def write_tensors(path, tensors, metadata=None):
    """Like safetensors.torch.save_file, but keeps the umask's permissions.

    `metadata` is any JSON object. It is stored under one key, so equal contents give equal bytes.
    """
    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
        texts = {"json": json.dumps(metadata)} if metadata else {"format": "pt"}
        save_file(tensors, temporary, texts)
        temporary.chmod(mode)


def read_tensors(path, device="cpu"):
    """The tensors of a safetensors file, and the metadata that write_tensors stored."""
    with reading(path), safe_open(path, "pt", device=str(device)) as file:
        metadata = json.loads((file.metadata() or {}).get("json", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def file_hash(*paths, last=1_000_000_000_000):
    """A short SHA-256 over the SHA-256 of each file's `last` bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - last))
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
