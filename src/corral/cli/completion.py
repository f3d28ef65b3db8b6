"""completion: what a shell needs so that Tab completes commands, options and the names of installed models.

`corral completion SHELL` prints a small function of that shell. It calls the hidden `corral __complete -- WORD…`, whose last word
is the one being typed, and which answers with one candidate a line, `value<tab>what it is`; a line `:` asks for file names. Only
the functions are in the shells' languages, so that all shells know the same.
"""

import sys

import click

from corral.cli.command import command
from corral.cli.context import Environment, pass_environment

#: Bash cuts words at the colons of model names, so the line is split here, and what stands before the last colon is left out of
#: the candidates again. macOS' bash 3.2 has no compopt and completes no file names.
_BASH = r"""_corral() {
    local line="${COMP_LINE:0:COMP_POINT}" words cur kept="" value help
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    cur="${words[${#words[@]}-1]}"
    [[ $COMP_WORDBREAKS == *:* && $cur == *:* ]] && kept="${cur%"${cur##*:}"}"
    COMPREPLY=()
    while IFS=$'\t' read -r value help; do
        if [[ $value == : ]]; then
            compopt -o default 2>/dev/null
        else
            COMPREPLY+=("${value#"$kept"}")
        fi
    done < <("${words[0]}" __complete -- "${words[@]:1}" 2>/dev/null)
}
complete -F _corral corral
"""
_ZSH = r"""#compdef corral
_corral() {
    local -a values texts
    local value help
    while IFS=$'\t' read -r value help; do
        if [[ $value == : ]]; then
            _files
        else
            values+=("$value")
            texts+=("$value${help:+  -- $help}")
        fi
    done < <("${words[1]}" __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)
    (( $#values )) && compadd -l -d texts -a values
}
if [[ $funcstack[1] == _corral ]]; then
    _corral "$@"
else
    compdef _corral corral
fi
"""
_FISH = r"""function __corral_complete
    set -l current (commandline -ct)
    set -l words (commandline -opc) "$current"
    set -l found ($words[1] __complete -- $words[2..-1] 2>/dev/null)
    if contains -- : $found
        __fish_complete_path "$current"
    else
        string join \n -- $found
    end
end
complete -c corral -f -a '(__corral_complete)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


@command(variables=())
@click.argument("shell", type=click.Choice(list(_SCRIPTS)))
def completion(shell: str) -> None:
    """Print the completion of a shell: bash, zsh or fish.

    \b
    bash   source <(corral completion bash)      in ~/.bashrc
    zsh    source <(corral completion zsh)       in ~/.zshrc
    fish   corral completion fish | source       in config.fish
    """
    sys.stdout.write(_SCRIPTS[shell])


@click.command("__complete", hidden=True, add_help_option=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@pass_environment
def complete(environment: Environment, words: tuple[str, ...]) -> None:
    """Print what the last of WORDS may become, one candidate a line."""
    from click.shell_completion import ShellComplete

    from corral.cli.app import root

    *before, current = words or ("",)
    for item in ShellComplete(root, {"obj": environment}, "corral", "").get_completions(before, current):
        about = " ".join((item.help or "").split())
        sys.stdout.write(":\n" if item.type in ("file", "dir") else f"{item.value}\t{about}\n")
