"""todoClient under Flower: one hospital, which trains on its own index.

README.md has the commands. It needs this project's folder as its working directory and in
PYTHONPATH. Flower starts a process for each training, so nothing is kept from round to round: seed,
client and round say it all. (But for the features of a frozen base: client001/features.npz.)
"""

from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import data
import model

app = ClientApp()


@app.train()
def train(message, context):
    settings = context.run_config
    name = context.node_config["name"]
    arch = model.ARCHS[settings["arch"]]
    image_size = settings["image-size"] or arch.image_size
    # as todoServer tells its clients: a network that begins from ImageNet trains its last layers
    freezes_base = arch.freezes_base(settings["weights"] or arch.weights)
    records = data.read_index(data.worker_index(name))
    model.configure(settings["seed"], settings["threads"])
    network = model.build(settings["arch"], image_size)
    if freezes_base:
        model.freeze_base(network)
    set_tensors(network, message.content["arrays"])
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    batches = data.TrainingBatches(
        data.images_for(records, image_size, folder, on_features=freezes_base),
        data.healthy(records),
        settings["batch-size"],
        settings["seed"],
        name,
        augment=settings["augmentation"] and not freezes_base,
    )
    round_number = message.content["config"]["server-round"]
    epochs = settings["epochs"] or model.default_epochs(network)
    rows = model.train(network, batches, round_number, epochs)
    metrics = {"num-examples": len(records), "loss": rows[-1]["loss"]}
    content = RecordDict(
        {
            "arrays": tensors_of(network),
            "metrics": MetricRecord(metrics),
            "client": ConfigRecord({"name": name}),
        }
    )
    return Message(content=content, reply_to=message)


def tensors_of(network):
    """The network's weights as Flower sends them, in the order of the weight file."""
    return ArrayRecord([variable.numpy() for variable in model.tensors(network)])


def set_tensors(network, arrays):
    for variable, array in zip(model.tensors(network), arrays.to_numpy_ndarrays(), strict=True):
        variable.assign(array)
