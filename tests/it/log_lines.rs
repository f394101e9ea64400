//! The log of a server whose standard error is not read.

use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::{CWD, FileType, Mode, OFlags};

use crate::support::cluster::{Cluster, http_get, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_costs_lines_and_nothing_else() {
    let mut cluster = Cluster::new(1);
    cluster.set("telemetry.level", "trace,openraft=trace,h2=trace");
    let pipe = cluster.log_path(0);
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Open, as else nobody could write; and never read.
    let unread =
        std::fs::OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&pipe).unwrap();
    cluster.start_all().await;
    let mut n = 0;
    wait_for("lines to be lost", async || {
        n += 1;
        cluster.put(0, &format!("k{n}"), "v").await;
        let (_, text) = http_get(&cluster.status_endpoint(0), "/metrics").await.map_err(|error| error.to_string())?;
        let lost = text.lines().find_map(|line| line.strip_prefix("quorate_log_lines_lost_total ")).unwrap_or("none");
        if lost.parse::<u64>().is_ok_and(|lost| lost > 100) { Ok(()) } else { Err(format!("{lost} after {n} puts")) }
    })
    .await;
    assert_eq!(cluster.get(0, &format!("k{n}")).await.as_deref(), Some("v"));
    // It ends as any, though its last lines are not read either.
    cluster.terminate(0).await;
    drop(unread);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_does_not_answer_is_told_of_when_it_begins_and_when_it_ends() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let dead = (leader + 1) % 3;
    cluster.kill(dead);
    cluster.wait_logged(leader, &["condition begins", "member-dead", "does not answer"]).await;
    for n in 0..50 {
        cluster.put(leader, &format!("k{n}"), "v").await;
    }
    cluster.start_pod(dead);
    cluster.wait_logged(leader, &["condition ends", "member-dead"]).await;
    let text = cluster.log_text(leader);
    let told = text.lines().filter(|line| line.contains("condition begins") && line.contains("member-dead")).count();
    // One a term: on a busy machine another may have led meanwhile.
    assert!((1..4).contains(&told), "{told} times\n{text}");
    assert!(!text.contains("failed to send a heartbeat"), "not with each of them\n{text}");
}
