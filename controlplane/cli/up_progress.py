"""How far the data planes are with loading their model: bars on a terminal, a line at the end elsewhere, events with --json."""

from types import TracebackType

from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from controlplane.cli.output import Output
from controlplane.cli.process import Event


class StartProgress:
    """One bar per data plane, from its start to its `ready` event; a context manager that owns the terminal's last lines."""

    def __init__(self, output: Output) -> None:
        self._output = output
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
        )
        is_hidden = output.as_json or not output.errors.is_terminal
        self._progress = Progress(*columns, console=output.errors, disable=is_hidden)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "StartProgress":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, name: str, event: Event) -> None:
        """Shows an event of the process of that name."""
        if self._output.as_json:
            self._output.json({"process": name, **event})
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(f"{name} starts", total=None)
        task = self._tasks[name]
        if event["event"] == "loading":
            done, total = int(event.get("bytes_done", 0)), int(event.get("bytes_total", 0))
            self._progress.update(task, description=f"{name} loads the model", completed=done, total=total or None)
        elif event["event"] == "ready":
            size = self._progress.tasks[self._progress.task_ids.index(task)].total or 1
            self._progress.update(task, description=f"{name} is ready", completed=size, total=size)
            if not self._output.errors.is_terminal:
                self._output.note(f"{name} is ready")
