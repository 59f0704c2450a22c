"""todoClient under Flower: one hospital, which trains on its own index.

    flower-supernode --insecure --superlink localhost:8000 --node-config 'name="client001"'

It needs this project's folder as its working directory and in PYTHONPATH. Flower starts a process
for each training, so nothing is kept from round to round: seed, client and round say it all.
"""

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from server_app import set_tensors, tensors_of

import data
import model

app = ClientApp()


@app.train()
def train(message, context):
    settings = context.run_config
    name = context.node_config["name"]
    image_size = settings["image-size"] or model.ARCHS[settings["arch"]].image_size
    records = data.read_index(data.worker_index(name))
    model.configure(settings["seed"], settings["threads"])
    network = model.build(settings["arch"], image_size)
    if settings["freeze-base"]:
        model.freeze_base(network)
    set_tensors(network, message.content["arrays"])
    batches = data.TrainingBatches(
        data.load_images(records, image_size),
        data.healthy(records),
        settings["batch-size"],
        settings["seed"],
        name,
        settings["augmentation"],
    )
    round_number = message.content["config"]["server-round"]
    rows = model.train(network, batches, round_number, settings["epochs"])
    metrics = {"num-examples": len(records), "loss": rows[-1]["loss"]}
    content = RecordDict({"arrays": tensors_of(network), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
