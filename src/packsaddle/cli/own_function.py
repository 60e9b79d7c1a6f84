"""Import and call functions of a user's script, which the command line names as MODULE:FUNCTION."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from packsaddle.errors import ConfigError
from packsaddle.messages import first_line


def call(function: str, *arguments: Any) -> Any:
    """Import a function, given as MODULE:FUNCTION, and return the result of calling it with `arguments`. Modules in the
    current folder are found too. Raises ConfigError if the import or the call fails."""
    module, colon, name = function.partition(":")
    if not (module and colon and name.isidentifier()):
        raise ConfigError(f"the function must be given as module:function, got {function!r}")
    if (here := str(Path.cwd())) not in sys.path:
        # The folder stays in sys.path, since the returned objects may import modules later.
        sys.path.insert(0, here)
    # Hide the command line of packsaddle from a script that parses its arguments when it is imported.
    arguments_here, sys.argv = sys.argv, [module]
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:  # a script can raise anything
        advice = "run its training under if __name__ == '__main__'"
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            is_file = module.endswith(".py")
            advice = f"write {module.removesuffix('.py')}:{name}" if is_file else "is it in the current folder?"
        raise ConfigError(f"{module} cannot be imported: {first_line(error)}; {advice}") from None
    finally:
        sys.argv = arguments_here
    if not callable(found):
        raise ConfigError(f"{module} has no function {name!r}")
    try:
        return found(*arguments)
    except Exception as error:
        raise ConfigError(f"{function} failed: {first_line(error)}") from None
