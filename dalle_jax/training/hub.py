"""Runs by the name of their repository at Hugging Face."""

import re
from pathlib import Path

NAME = re.compile(r'([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)')  # OWNER/REPOSITORY, and what is in it


def local(path: str | Path) -> Path:
  """`path`, or for the name OWNER/REPOSITORY of one that is no directory here, where its files were downloaded to.

  OWNER/REPOSITORY/FOLDER is a folder in it, such as the frozen/vqgan of a run.
  Raises FileNotFoundError when it cannot be had; without huggingface_hub (the extra `hf`) that names the extra.
  """
  name, path = str(path), Path(path).expanduser()
  found = NAME.fullmatch(name)
  if path.exists() or not found or Path(path.parts[0]).is_dir():
    return path
  name, inside = found.groups()
  try:
    import huggingface_hub
  except ImportError:
    raise FileNotFoundError(
      f'there is no directory {name}; if it is a repository of Hugging Face: pip install -e ".[hf]".'
    ) from None
  try:
    return Path(huggingface_hub.snapshot_download(name)) / inside.lstrip('/')
  except Exception as e:  # of the network, of the hub, of the disk: they have no common class
    text = ' '.join(str(e).split())[:200]
    raise FileNotFoundError(f'{name} is no directory, and Hugging Face does not give it ({text}).') from e
