//! Commands that ask every member, and members by their name.

use super::*;
use crate::support::cluster::wait_for;

/// What a command printed that must end with code 1 and one line of why.
#[track_caller]
fn found(cli: &Cli, args: &[&str]) -> (String, String) {
    let output = cli.output(args, b"");
    let [out, error] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{args:?}: {out}{error}");
    (out, error)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_is_asked_through_any_endpoint_and_the_exit_code_is_the_verdict() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    for n in 0..10 {
        cluster.put(n % 3, &format!("k{n}"), "v").await;
    }
    let cli = Cli { endpoints: cluster.endpoint(leader) };
    let table = cli.run(&["hash"]);
    let hash = format!("{:08x}", cluster.wait_same_hash(0..3).await);
    assert_eq!(table.matches(&hash).count(), 3, "{table}");
    assert!(table.lines().last().unwrap().starts_with("equal: 3 of 3 members"), "{table}");
    let json = cli.json(&["hash"]);
    let names: Vec<&str> = json["members"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert_eq!((&json["verdict"], names), (&"equal".into(), vec!["kv-0", "kv-1", "kv-2"]), "{json}");
    assert_eq!(json["members"][0]["id"], format!("{:016x}", cluster.member_id(0).await));
    let table = cli.run(&["health"]);
    assert_eq!(table.matches(" healthy").count(), 3, "{table}");
    let done = cli.run(&["defrag"]);
    let order: Vec<&str> = done.lines().map(|line| &line[..4]).collect();
    assert_eq!((order.len(), order[2]), (3, &format!("kv-{leader}")[..]), "the leader is the last: {done}");
    assert_eq!(cli.run(&["hash", "--only-endpoints"]).lines().count(), 3, "one member, and the verdict");
    let top = cli.json(&["top", "--count", "1"]);
    assert_eq!(top["members"].as_array().unwrap().len(), 3, "{top}");
    let top = cli.run(&["top", "--count", "2", "--interval", "200ms"]);
    assert_eq!(top.matches(" voter ").count(), 4, "two tables of two voters and a leader: {top}");
    assert!(top.contains(&format!("leader: kv-{leader}   members: 3 of 3 answer")), "{top}");

    let victim = (leader + 1) % 3;
    cluster.kill(victim);
    let name = format!("kv-{victim}");
    let (table, error) = found(&cli, &["health"]);
    assert!(table.lines().any(|line| line.contains(&name) && line.contains("unhealthy")), "{table}");
    assert!(error.contains(&format!("1 of 3 members are not healthy: {name}")), "{error}");
    let (table, error) = found(&cli, &["hash"]);
    assert!(
        table.contains(&hash) && error.contains(&format!("no hash of {name}; the others are equal")),
        "{table}{error}"
    );
    let (table, error) = found(&cli, &["defrag"]);
    assert_eq!(table.matches(": done").count(), 2, "the others are done all the same: {table}");
    assert!(error.contains("1 of 3 members are not defragmented") && error.contains(&name), "{error}");

    // What only reads goes on at the next endpoint: one is dead, and the next has no leader.
    cluster.kill((leader + 2) % 3);
    let alone = cluster.endpoint(leader);
    let reads = [&["get", "k1", "--timeout", "3s"][..], &["lease", "list", "--timeout", "3s"]];
    wait_for("the last one to lose its leader", async || {
        let output = Cli { endpoints: alone.clone() }.output(reads[0], b"");
        if output.status.success() { Err("it answers") } else { Ok(()) }
    })
    .await;
    let healthy = Cluster::start(1).await;
    healthy.put(0, "k1", "elsewhere").await;
    let all = Cli { endpoints: format!("{},{alone},{}", cluster.endpoint(victim), healthy.endpoint(0)) };
    assert_eq!(all.run(reads[0]), "k1\nelsewhere\n");
    assert_eq!(all.run(reads[1]), "");
    let none = Cli { endpoints: format!("{},{alone}", cluster.endpoint(victim)) };
    let error = none.fails(reads[0]);
    assert!(
        error.contains(&alone) && error.contains(&cluster.endpoint(victim)) && error.contains("who leads"),
        "{error}"
    );
    assert_eq!(none.run(&["get", "k1", "--serializable"]), "k1\nv\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_moves_to_who_is_named_and_members_go_by_name() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let cli = Cli { endpoints: cluster.endpoint((leader + 1) % 3) };
    let said = cli.run(&["move-leader"]);
    assert!(said.ends_with(&format!("leads now; it was kv-{leader}\n")), "{said}");
    let named = format!("kv-{leader}");
    let said = cli.run(&["move-leader", &named]);
    assert!(said.starts_with(&format!("{named} leads now")), "{said}");
    let id = format!("{:016x}", cluster.member_id(leader).await);
    wait_for("who was asked to know the leader", async || match cli.run(&["move-leader", &id]) {
        said if said == format!("{named} leads already\n") => Ok(()),
        said => Err(said),
    })
    .await;
    let error = cli.fails(&["move-leader", "kv-7"]);
    assert!(error.contains("no member is named \"kv-7\"") && error.contains("kv-0, kv-1, kv-2"), "{error}");
    let error = cli.fails(&["member", "remove", "kv-7"]);
    assert!(error.contains("no member is named"), "{error}");
    let gone = format!("kv-{}", (leader + 2) % 3);
    let said = cli.run(&["member", "remove", &gone]);
    assert!(said.starts_with(&format!("removed {gone} (")), "{said}");
    let list = cli.json(&["member", "list"]);
    let names: Vec<&str> = list["members"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert!(names.is_sorted() && !names.contains(&&gone[..]), "{list}");
}
