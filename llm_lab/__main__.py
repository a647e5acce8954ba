"`python -m llm_lab` is the command `llm-lab`"

from .cli import program

if __name__ == '__main__':
    program()
