"""Runs from Hugging Face, by the name of their repository."""

import re
from pathlib import Path

NAME = re.compile(r'([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)')  # OWNER/REPOSITORY, and a path in it


def local(path: str | Path) -> Path:
  """Returns `path` if it is local, or else downloads the repository OWNER/REPOSITORY and returns where its files are.

  OWNER/REPOSITORY/FOLDER is a folder in it, such as the frozen/vqgan of a run. Raises FileNotFoundError if the download
  fails, or, naming the extra `hf`, if huggingface_hub is not installed, and ValueError for an empty path.
  """
  if not path or not isinstance(path, (str, Path)):
    raise ValueError(f'a run is given by its directory, not {path!r}.')
  name, path = str(path), Path(path).expanduser()
  match = NAME.fullmatch(name)
  if path.exists() or not match or Path(path.parts[0]).is_dir():
    return path
  name, inside = match.groups()
  try:
    import huggingface_hub
  except ImportError:
    raise FileNotFoundError(
      f'there is no directory {name}; if it is a Hugging Face repository, run: pip install -e ".[hf]".'
    ) from None
  try:
    return Path(huggingface_hub.snapshot_download(name)) / inside.lstrip('/')
  except Exception as e:  # errors of the network, the hub and the disk have no common class
    text = ' '.join(str(e).split())[:200]
    raise FileNotFoundError(f'{name} is not a directory, and cannot be downloaded from Hugging Face ({text}).') from e
