"""`python -m videopipe` is the command line of `pipelines`: the one place that looks upwards, and only when run."""


def main() -> None:
    """Run the command line."""
    from pipelines.cli import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
