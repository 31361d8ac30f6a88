"""Flower's deployment engine as the transport: what its server and its clients do with messages.

The only module that imports Flower, and only its documented message API. Flower starts a process for every message to a
device, and one for a run on the server: both pass messages on to processes that stay.
"""

from typing import Any

from lwfedssl_jax.pilot import channel
from lwfedssl_jax.pilot.channel import Packet
from lwfedssl_jax.pilot.protocol import Message

QUESTION = "Ask"  # the only kind of message that needs no training


def carry(grid: Any, path: str) -> None:
    """Do what the pilot's server asks for, over its socket, until it closes the connection.

    Args:
      grid: Flower's.
      path: of the socket.
    """
    from flwr.app import Message as FlowerMessage
    from flwr.app import MessageType

    connection = channel.connect(path)
    while True:
        try:
            asked, arrays = channel.receive(connection)
        except OSError:
            return
        answer, packed = dict[str, Any](), dict[str, bytes]()
        if asked["do"] == "nodes":
            answer["nodes"] = {str(node.node_id): node.name for node in grid.get_nodes()}
        elif asked["do"] == "send":
            kind = MessageType.QUERY if asked["kind"] == QUESTION else MessageType.TRAIN
            content = to_records(Message(asked["kind"], asked["fields"], dict(arrays)))
            message = FlowerMessage(content, int(asked["node"]), kind, ttl=asked["seconds"])
            answer["id"] = next(iter(grid.push_messages([message])), None)
        else:
            answer["answers"] = []
            for number, reply in enumerate(grid.pull_messages(asked["ids"]) if asked["ids"] else ()):
                entry: dict[str, Any] = {"id": reply.metadata.reply_to_message_id}
                if reply.has_error():
                    entry["why"] = f"Flower's error {reply.error.code}"
                else:
                    read = from_records(reply.content)
                    entry |= {"kind": read.kind, "fields": read.fields, "arrays": list(read.arrays)}
                    packed |= {f"{number} {name}": content for name, content in read.arrays.items()}
                answer["answers"].append(entry)
        channel.send(connection, Packet(answer, packed))


def ask_worker(message: Any, path: str) -> Any:
    """Return the worker's answer to a message of Flower's, as one.

    Raises:
      OSError: there is no worker at the socket.
    """
    from flwr.app import Message as FlowerMessage

    asked = from_records(message.content)
    connection = channel.connect(path)
    try:
        channel.send(connection, Packet({"kind": asked.kind, "fields": asked.fields}, asked.arrays))
        answer, arrays = channel.receive(connection)
    finally:
        connection.close()
    return FlowerMessage(to_records(Message(answer["kind"], answer["fields"], dict(arrays))), reply_to=message)


def to_records(message: Message) -> Any:
    """Return a message as Flower's records: an array of bytes each, which is the least that it sends."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = {name: Array("uint8", (len(x),), "bytes", x) for name, x in message.arrays.items()}
    return RecordDict({"about": ConfigRecord({"kind": message.kind, **message.fields}), "arrays": ArrayRecord(arrays)})


def from_records(records: Any) -> Message:
    """Return the message that ``to_records`` made records of."""
    fields = dict(records["about"])
    return Message(str(fields.pop("kind")), fields, {name: array.data for name, array in records["arrays"].items()})
