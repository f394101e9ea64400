//! What is different where a person sits at a terminal: `script` makes one.

use super::*;
use crate::support::cluster::binary;

impl Cli {
    /// What a terminal shows of a command line, typed `input` at it.
    fn on_terminal(&self, line: &str, input: &str) -> String {
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", line, "/dev/null"])
            .env("PATH", format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap()))
            .env("QUORATE_ENDPOINTS", &self.endpoints)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script is part of every Debian");
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let shown = String::from_utf8(output.stdout).unwrap().replace("\r\n", "\n");
        assert!(output.status.success(), "{line}: {shown}");
        shown
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_told_what_is_waited_for_and_gets_no_escapes() {
    let cluster = Cluster::start(1).await;
    let cli = Cli { endpoints: cluster.endpoint(0) };
    let hostile = "\u{1b}[2Jkey";
    cluster.put(0, hostile, "one\ntwo\u{1b}]0;title\u{7}").await;
    let shown = cli.on_terminal("quorate get --prefix ''", "");
    assert_eq!(shown, "\\x1b[2Jkey\none\ntwo\\x1b]0;title\\x07\n");
    assert_eq!(
        cli.run(&["get", hostile]),
        format!("{hostile}\none\ntwo\u{1b}]0;title\u{7}\n"),
        "a pipe gets the bytes"
    );

    let shown = cli.on_terminal("quorate put typed", "hello\n\u{4}");
    assert!(shown.contains("type the value, and end it with Ctrl-D") && shown.contains("OK\n"), "{shown}");
    assert_eq!(cluster.get(0, "typed").await.as_deref(), Some("hello\n"));

    let shown = cli.on_terminal("quorate txn", "version(\"typed\") > 0\n\nput typed again\n\n\n");
    assert!(shown.contains("compares, such as") && shown.contains("what to do else"), "{shown}");
    assert!(shown.ends_with("SUCCESS\n\nOK\n"), "{shown}");

    let shown = cli.on_terminal("quorate top --count 1", "");
    assert!(shown.starts_with("\u{1b}[?1049h") && shown.trim_end().ends_with("\u{1b}[?1049l"), "{shown:?}");
    assert!(shown.contains("leader: kv-0"), "{shown:?}");
}
