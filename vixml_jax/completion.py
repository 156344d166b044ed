"""Writes the completion of `vixml` for bash and zsh: commands, their flags, and values or files after `=`."""

from collections.abc import Mapping
import importlib

from absl import flags

from vixml_jax import command_help
from vixml_jax.run.named_configs import config_names

SHELLS = ("bash", "zsh")

# bash splits `--flag=value` into three words, since `=` is one of its word breaks.
_BASH = """\
# Completion of vixml for bash. To load it: . <(vixml completion bash)
_vixml() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} flag="" values=""
  if [[ $COMP_CWORD == 1 ]]; then
    mapfile -t COMPREPLY < <(compgen -W "COMMANDS" -- "$current")
    return
  fi
  if [[ $current == "=" ]]; then
    flag=$previous current=""
  elif [[ $previous == "=" ]]; then
    flag=${COMP_WORDS[COMP_CWORD-2]}
  fi
  if [[ -n $flag ]]; then
    case "${COMP_WORDS[1]} $flag" in
VALUES
    esac
    compopt -o filenames 2> /dev/null
    mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current"; compgen -f -- "$current")
    return
  fi
  case ${COMP_WORDS[1]} in
FLAGS
  esac
  mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current")
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
  return 0
}
complete -F _vixml vixml
"""

_ZSH = """\
#compdef vixml
# Completion of vixml for zsh. To load it, after compinit: . <(vixml completion zsh)
# Or write it to a file _vixml in a folder of $fpath, before compinit.
_vixml() {
  local flag="" values=""
  if (( CURRENT == 2 )); then
    compadd -- COMMANDS
    return
  fi
  if [[ $PREFIX == --*=* ]]; then
    flag=${PREFIX%%=*}
    compset -P '*='
    case "$words[2] $flag" in
VALUES
    esac
    compadd -- ${=values}
    _files
    return
  fi
  case $words[2] in
FLAGS
  esac
  compadd -S '' -- ${(M)${=values}:#*=}
  compadd -- ${${=values}:#*=}
}
if [[ ${funcstack[1]} == _vixml ]]; then
  _vixml "$@"  # Loaded from $fpath by the first completion.
else
  compdef _vixml vixml
fi
"""


def script(shell: str, modules: Mapping[str, str]) -> str:
  """Returns the script of a shell.

  Args:
    shell: One of `SHELLS`.
    modules: Name of each command -> module of its entry point in this package.
  """
  known, values = {"completion": list(SHELLS)}, []
  for command, module in modules.items():
    found = read_flags(module)
    known[command] = ["--help", *map(_word, found), *map(_word, command_help.flags_of_all())]
    values += [(f"{command} --{flag.name}", _values(flag)) for flag in found if _values(flag)]
  return (
    (_BASH if shell == "bash" else _ZSH)
    .replace("COMMANDS", " ".join([*modules, "completion", "--help", "--version"]))
    .replace("VALUES", "\n".join(f'      "{key}") values="{" ".join(words)}" ;;' for key, words in values))
    .replace("FLAGS", "\n".join(f'    {key}) values="{" ".join(words)}" ;;' for key, words in known.items()))
    .rstrip()
  )


def read_flags(module: str) -> list[flags.Flag]:
  """Returns the flags of an entry point, and removes them again: the next one may have flags of the same name."""
  importlib.import_module(f"vixml_jax.{module}")
  found = command_help.flags_of(f"vixml_jax.{module}")
  for flag in found:
    delattr(flags.FLAGS, flag.name)
  return found


def _word(flag: flags.Flag) -> str:
  return f"--{flag.name}" if flag.boolean else f"--{flag.name}="


def _values(flag: flags.Flag) -> list[str]:
  """Returns the values that a flag may have; empty if they are not known."""
  return config_names() if flag.name == "config" else list(getattr(flag.parser, "enum_values", []))
