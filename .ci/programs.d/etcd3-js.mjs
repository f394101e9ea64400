// Every part of the npm package etcd3, against the endpoints of the first argument. Ends with code 1 at what is not as it must be.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { Etcd3, EtcdLockFailedError, Range } from 'etcd3';

const hosts = process.argv[2].split(',').map((endpoint) => `http://${endpoint}`);
const client = new Etcd3({ hosts });

const cases = {
  async 'keys are put, read in ranges and deleted'() {
    await client.put('k/a').value('1');
    await client.put('k/b').value('2');
    assert.equal(await client.get('k/a').string(), '1');
    assert.deepEqual(await client.getAll().prefix('k/').strings(), { 'k/a': '1', 'k/b': '2' });
    assert.deepEqual(await client.getAll().prefix('k/').sort('Key', 'Descend').limit(1).keys(), ['k/b']);
    assert.equal((await client.delete().prefix('k/')).deleted, '2');
    assert.equal(await client.get('k/a').string(), null);
  },
  async 'a transaction takes one branch'() {
    await client.put('t').value('1');
    const write = (value) => client.if('t', 'Value', '==', value).then(client.put('t').value('2')).else(client.get('t')).commit();
    assert.equal((await write('1')).succeeded, true);
    assert.equal((await write('1')).succeeded, false);
  },
  async 'a watcher is told puts and deletions'() {
    const watcher = await client.watch().prefix('w/').withPreviousKV().create();
    const put = once(watcher, 'put');
    await client.put('w/a').value('1');
    assert.equal((await put)[0].value.toString(), '1');
    const deleted = once(watcher, 'delete');
    await client.delete().key('w/a');
    assert.equal((await deleted)[1].value.toString(), '1');
    await watcher.cancel();
  },
  async 'a watcher starts in the past'() {
    const { header } = await client.put('past').value('1');
    await client.put('past').value('2');
    const watcher = await client.watch().key('past').startRevision(header.revision).create();
    assert.equal((await once(watcher, 'data'))[0].events[0].kv.value.toString(), '1');
    await watcher.cancel();
  },
  async 'a lease is kept alive, and takes its keys with it'() {
    const lease = client.lease(2);
    await lease.put('leased').value('v');
    await once(lease, 'keepaliveSucceeded');
    assert.equal(await client.get('leased').string(), 'v');
    await lease.revoke();
    assert.equal(await client.get('leased').string(), null);
  },
  async 'a lease that nobody keeps alive ends'() {
    const lease = client.lease(1, { autoKeepAlive: false });
    const watcher = await client.watch().key('short').create();
    const deleted = once(watcher, 'delete');
    await lease.put('short').value('v');
    await deleted;
    await watcher.cancel();
  },
  async 'a lock has one holder'() {
    const lock = await client.lock('lock').acquire();
    await assert.rejects(client.lock('lock').acquire(), EtcdLockFailedError);
    await lock.release();
    assert.equal(await client.lock('lock').do(() => 'held'), 'held');
  },
  async 'concurrent additions by STM lose nothing'() {
    await client.put('sum').value('0');
    const add = () => client.stm({ retries: 100 }).transact(async (tx) => {
      await tx.put('sum').value(String(Number(await tx.get('sum').string()) + 1));
    });
    await Promise.all(Array.from({ length: 10 }, add));
    assert.equal(await client.get('sum').string(), '10');
  },
  async 'an election passes on'() {
    const election = client.election('election', 5);
    const first = election.campaign('a');
    await once(first, 'elected');
    const second = election.campaign('b');
    const elected = once(second, 'elected');
    assert.equal(await election.leader(), 'a');
    await first.resign();
    await elected;
    assert.equal(await election.leader(), 'b');
    await second.resign();
  },
  async 'a namespace has its own keys'() {
    await client.namespace('space/').put('k').value('v');
    assert.equal(await client.get('space/k').string(), 'v');
  },
  async 'maintenance and members are told'() {
    assert.equal((await client.cluster.memberList({})).members.length, hosts.length);
    assert.ok(Number((await client.maintenance.status()).dbSize) > 0);
  },
  async 'users may do what their roles say'() {
    await client.user('root').create('secret');
    await client.role('root').create().catch(() => {});
    await client.user('root').addRole('root');
    const role = client.role('reads');
    await role.create();
    await role.grant({ permission: 'Read', range: Range.prefix('k/') });
    await client.user('reader').create('pass');
    await client.user('reader').addRole('reads');
    await client.auth.authEnable();
    const as = (username, password) => new Etcd3({ hosts, auth: { username, password } });
    const root = as('root', 'secret');
    const reader = as('reader', 'pass');
    try {
      await root.put('k/a').value('1');
      assert.equal(await reader.get('k/a').string(), '1');
      await assert.rejects(Promise.resolve(reader.put('k/a').value('2')), /permission denied/);
      await assert.rejects(Promise.resolve(as('reader', 'wrong').get('k/a').string()), /authentication failed|invalid user/);
    } finally {
      await root.auth.authDisable();
      root.close();
      reader.close();
    }
  },
};

for (const [name, run] of Object.entries(cases)) {
  await run().catch((error) => {
    console.error(`${name}: failed`, error);
    process.exit(1);
  });
  console.log(`ok ${name}`);
}
console.log(`${Object.keys(cases).length} cases passed`);
process.exit(0);
