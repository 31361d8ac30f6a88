"""Flower's deployment engine as the transport: what its server and its clients do with messages.

The only module that imports Flower, and only its documented message API. Flower starts a process for every message to a
device, and one for a run on the server: both pass messages on to processes that stay.
"""

from typing import Any

from lwfedssl_jax.pilot import channel
from lwfedssl_jax.pilot.channel import Packet
from lwfedssl_jax.pilot.protocol import Message

LARGEST = 2**31  # bytes of a message
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
                try:
                    if reply.has_error():
                        raise ValueError(f"Flower's error {reply.error.code}")
                    read = from_records(reply.content)
                    entry |= {"kind": read.kind, "fields": read.fields, "arrays": list(read.arrays)}
                    packed |= {f"{number} {name}": content for name, content in read.arrays.items()}
                except ValueError as error:  # one device's, not the others'
                    entry["why"] = str(error)
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
    """Return the message that ``to_records`` made records of.

    Raises:
      ValueError: they are others, or have too many bytes.
    """
    try:
        fields = dict(records["about"])
        kind, arrays = fields.pop("kind"), {str(name): array.data for name, array in records["arrays"].items()}
        known = isinstance(kind, str) and all(isinstance(value, str | int | float) for value in fields.values())
        size = sum(map(len, arrays.values())) + sum(len(str(value)) for value in fields.values())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"records that are no message ({type(error).__name__})") from error
    if not known or size > LARGEST:
        raise ValueError("records that are no message" if not known else f"a message of {size} bytes")
    return Message(kind, fields, arrays)
