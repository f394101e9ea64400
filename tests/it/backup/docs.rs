//! The commands of docs/continuous.md, as a person would type them.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_the_document_work() {
    let directory = tempfile::tempdir().unwrap();
    let backups = directory.path().join("backups").to_str().unwrap().to_owned();
    let mut cluster = backing_up(1, &backups);
    cluster.start_all().await;
    wait_archived(&cluster, &[0]).await;
    let revision = cluster.put(0, "greeting", "hello").await.to_string();
    wait_archived(&cluster, &[0]).await;
    let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/continuous.md")).unwrap();
    let commands: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("    quorate "))
        .filter(|command| command.starts_with("backup "))
        .collect();
    let bin = binary();
    let path = format!("{}:{}", bin.parent().unwrap().display(), std::env::var("PATH").unwrap());
    for command in &commands {
        let mut shell = Command::new("sh");
        shell.args(["-e", "-c", &format!("quorate {command}")]).current_dir(directory.path());
        shell.env("PATH", &path).env("BACKUPS", &backups).env("TIME", &time).env("REVISION", &revision);
        shell.env("ENDPOINTS", cluster.endpoint(0));
        let said = crate::support::tools::run(&mut shell);
        assert!(!said.is_empty(), "{command}");
    }
    let ran = |word: &str| commands.iter().filter(|command| command.starts_with(&format!("backup {word}"))).count();
    let kinds = ["status", "list", "verify", "restore", "adopt", "now", "prune"].map(ran);
    assert!(kinds.iter().all(|count| *count > 0), "{commands:?}");
    // The settings of the document are such that a member takes.
    let begin = text.find("    [backup]").unwrap();
    let settings: String = text[begin..]
        .lines()
        .take_while(|line| line.starts_with("    "))
        .map(|line| format!("{}\n", line.trim()))
        .collect();
    let file = directory.path().join("quorate.toml");
    std::fs::write(&file, settings).unwrap();
    let shown = quorate(&["config", "--config", file.to_str().unwrap()], &[]).unwrap();
    assert!(shown.contains("s3://backups/prod/kv"), "{shown}");
}
