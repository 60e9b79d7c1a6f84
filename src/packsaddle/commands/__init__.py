"""The commands of packsaddle, one function each; its arguments are the command's, its docstring the help."""
