"""TensorBoard event files of a run, written with tf.summary from the server's state.

server/tensorboard/RUN/all           the validation images' scores, round by round
server/tensorboard/RUN/client001     what this client measured on its own images

tensorboard --logdir server/tensorboard        # pip install tensorboard, on any machine
"""

import math

SCORES = ["loss", "accuracy", "auc", "sensitivity", "specificity"]


class EventFiles:
    """Writes what is new in a state; `write` again and again, from one thread.

    A server that starts again writes the whole run anew, and removes the files of before: nothing
    is missing and nothing is there twice, wherever the server was killed.

    folder  server/tensorboard/RUN (pathlib.Path)
    """

    def __init__(self, folder):
        self.folder = folder
        self.writers = {}  # "all" or a client -> its tf.summary writer
        self.rounds_written = 0
        self.scores_written = 0
        for old in folder.glob("*/events.out.tfevents.*"):
            old.unlink()

    def write(self, state):
        for row in state.history[self.rounds_written :]:
            self._write("all", row, SCORES)
        self.rounds_written = len(state.history)
        for row in state.client_scores[self.scores_written :]:
            # A curve is of one threshold: clients score the rounds at 0.5, and the result at the
            # one that was chosen.
            at_half = row.get("threshold", 0.5) in (0.5, "")
            self._write(row["client"], row, SCORES if at_half else ["loss", "auc"])
        self.scores_written = len(state.client_scores)
        for writer in self.writers.values():
            writer.flush()

    def _write(self, series, row, names):
        import tensorflow as tf  # the evaluation has loaded it by now

        if series not in self.writers:
            self.writers[series] = tf.summary.create_file_writer(str(self.folder / series))
        with self.writers[series].as_default(step=row["round"]):
            for name in names:
                value = row.get(name, "")
                if value not in ("", None) and math.isfinite(value):  # a client may not say it
                    tf.summary.scalar(name, value)
