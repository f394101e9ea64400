"""Quorate from Python, over gRPC, with the package `etcd3` from PyPI.

    python3 -m venv venv && venv/bin/pip install -r examples/clients/requirements.txt
    venv/bin/python examples/clients/python.py [HOST:PORT]

Any member may be asked; this asks 127.0.0.1:2379, where `quorate dev` has its first one.
"""

import sys
import threading

import etcd3

host, port = (sys.argv[1:] or ["127.0.0.1:2379"])[0].rsplit(":", 1)
client = etcd3.client(host=host, port=int(port), timeout=30)

# Keys and values are bytes. A put is on the disks of a majority when it returns.
client.put("fruit/apple", "red")
client.put("fruit/banana", "yellow")
value, meta = client.get("fruit/apple")
print("apple is", value.decode(), "since revision", meta.mod_revision)
print("fruit:", sorted(m.key.decode() for _, m in client.get_prefix("fruit/")))

# Compare and write in one step: the put happens if nobody has changed the key since.
done, _ = client.transaction(
    compare=[client.transactions.value("fruit/apple") == "red"],
    success=[client.transactions.put("fruit/apple", "green")],
    failure=[client.transactions.get("fruit/apple")],
)
print("repainted:", done, "and now", client.get("fruit/apple")[0].decode())

# What happens below a prefix, as it happens.
events, cancel = client.watch_prefix("fruit/")
threading.Timer(0.2, lambda: client.delete("fruit/banana")).start()
for event in events:
    print("seen:", type(event).__name__, event.key.decode())
    cancel()
    break

# Keys that vanish with their owner: a lease lives while it is refreshed.
lease = client.lease(ttl=30)
client.put("worker/1", "alive", lease=lease)
lease.refresh()
print("lease has", lease.remaining_ttl, "s left and holds", [key.decode() for key in lease.keys])
lease.revoke()
print("worker after revoke:", client.get("worker/1")[0])

# One holder at a time.
with client.lock("nightly-job", ttl=10) as lock:
    print("locked:", lock.is_acquired())

client.delete_prefix("fruit/")
print("done")
