//! Examples in the help of each command: the lines that people copy first.
//!
//! Invariant: every command but the ones that only hold others has one, and each parses (both tested).

/// A command's words, and its examples with what each is for.
const EXAMPLES: &[(&str, &[(&str, &str)])] = &[
    (
        "serve",
        &[
            ("quorate serve", "a cluster of one, data in /var/lib/quorate"),
            ("quorate serve --name kv-0 --peers kv-%d.example.org:2380 --size 3", "one of three machines"),
        ],
    ),
    ("etcd", &[("quorate etcd --name infra0 --data-dir /var/lib/etcd2", "a unit that was written for etcd")]),
    (
        "dev",
        &[
            ("quorate dev", "three members, gone at Ctrl-C"),
            ("quorate dev --kill-one-every 5s", "watch them survive"),
            ("quorate dev --host 127.0.0.2", "beside another one, on addresses of its own"),
        ],
    ),
    ("status", &[("quorate status", "all members; one endpoint is enough"), ("quorate status -o json", "for scripts")]),
    ("diagnose", &[("quorate diagnose --out diagnosis.tar", "one file for whoever helps")]),
    (
        "top",
        &[("quorate top", "until Ctrl-C"), ("quorate top --count 2 --interval 5s -o json", "two samples, for scripts")],
    ),
    ("health", &[("quorate health", "every member; exit code 1 if one does not serve")]),
    ("member list", &[("quorate member list", "names, ids and addresses")]),
    ("member add", &[("quorate member add kv-3.example.org:2380", "a node started with --by-hand")]),
    (
        "member remove",
        &[("quorate member remove kv-3", "by its name"), ("quorate member remove 8e9e05c52164694d", "by its id")],
    ),
    ("member update", &[("quorate member update kv-3 kv-3.new.example.org:2380", "it has moved")]),
    ("member promote", &[("quorate member promote kv-3", "a learner that was added with --learner")]),
    (
        "member scale",
        &[("quorate member scale 5", "slots 0 to 4"), ("quorate member scale --unset", "every member stays")],
    ),
    ("member why", &[("quorate member why", "why does nothing happen?")]),
    ("recover", &[("quorate recover --data-dir /var/lib/quorate --dry-run", "what would be kept, and what lost")]),
    (
        "get",
        &[
            ("quorate get greeting", "one key and its value"),
            ("quorate get --prefix app/ --keys-only", "the names alone"),
            ("quorate get --prefix app/ --sort-by modify --order descend --limit 3 -w table", "the newest changes"),
            ("quorate get greeting --rev 5 --print-value-only", "as it was"),
        ],
    ),
    (
        "put",
        &[
            ("quorate put greeting hello", "write a key"),
            ("quorate put config < config.yaml", "a value from standard input"),
            ("quorate put leader me --if-absent", "only if nobody has written it"),
            ("quorate put greeting goodbye --if-rev 5", "only if nobody has changed it since revision 5"),
        ],
    ),
    (
        "del",
        &[("quorate del greeting", "one key"), ("quorate del --prefix app/ --prev-kv", "all below it, and print them")],
    ),
    (
        "txn",
        &[
            ("quorate txn", "asks line by line"),
            ("quorate txn change.txt", "comparisons, an empty line, what to do, an empty line, what to do else"),
        ],
    ),
    (
        "watch",
        &[
            ("quorate watch --prefix app/", "what changes from now on"),
            ("quorate watch greeting --rev 5", "what changed since revision 5, and then on"),
            ("quorate watch greeting -- ./reload.sh", "a command for each change"),
        ],
    ),
    ("compact", &[("quorate compact 1000", "forget what was before revision 1000")]),
    ("backup now", &[("quorate backup now s3://backups/kv", "a full backup, before something dangerous")]),
    ("backup list", &[("quorate backup list s3://backups/kv", "what can be restored")]),
    ("backup status", &[("quorate backup status s3://backups/kv", "how old the newest is")]),
    ("backup verify", &[("quorate backup verify s3://backups/kv", "all of it, against what the members had")]),
    ("backup prune", &[("quorate backup prune s3://backups/kv --keep-fulls 3 --dry-run", "what would go")]),
    (
        "backup restore",
        &[
            ("quorate backup restore s3://backups/kv --data-dir restored", "the newest moment, for one member"),
            ("quorate backup restore s3://backups/kv --data-dir restored --at 2026-11-29T10:15:00Z", "as it was then"),
        ],
    ),
    ("backup adopt", &[("quorate backup adopt s3://backups/kv", "the cluster that wrote there is gone for good")]),
    (
        "promote",
        &[
            ("quorate promote", "a standby: the cluster that it follows is gone"),
            ("quorate promote --without-store", "and so is the store of its backups"),
        ],
    ),
    ("snapshot save", &[("quorate snapshot save backup.db", "of the first endpoint that answers")]),
    ("snapshot status", &[("quorate snapshot status backup.db", "what is in it")]),
    (
        "snapshot restore",
        &[(
            "quorate snapshot restore backup.db --data-dir restored --peers kv-%d.example.org:2380 --name kv-%d --size 3",
            "directories of a new cluster of three",
        )],
    ),
    (
        "migrate",
        &[
            ("quorate migrate --from etcd-0:2379 --to kv-0:2379", "copy and follow, until Ctrl-C"),
            ("quorate migrate --from etcd-0:2379 --to kv-0:2379 --until-synced", "copy what is there now"),
        ],
    ),
    (
        "mirror",
        &[
            (
                "quorate mirror --from kv-0.here:2379 --to kv-0.there:2379 --prefix app/",
                "keep another cluster's keys the same",
            ),
            (
                "quorate mirror --from kv-0:2379 --to kv-0:2379 --prefix app/ --to-prefix copy/app/",
                "in the same cluster",
            ),
        ],
    ),
    ("alarm list", &[("quorate alarm list", "nothing, if all is well")]),
    ("alarm disarm", &[("quorate alarm disarm", "when the cause is gone")]),
    ("defrag", &[("quorate defrag", "every member in turn, the leader last")]),
    ("hash", &[("quorate hash", "all members at one revision; exit code 1 if they differ")]),
    (
        "move-leader",
        &[("quorate move-leader", "to the voter that is furthest"), ("quorate move-leader kv-2", "to this one")],
    ),
    ("bench put", &[("quorate bench put --clients 200 --duration 30s", "as many puts as it takes")]),
    ("bench get", &[("quorate bench get --serializable --total 100000", "reads of whoever is asked")]),
    (
        "check perf",
        &[("quorate check perf", "150 puts a second for a minute"), ("quorate check perf --load m", "1000 of them")],
    ),
    ("log inspect", &[("quorate log inspect /var/lib/quorate --entries 20", "the newest twenty entries")]),
    (
        "lease grant",
        &[
            ("quorate lease grant 60s", "prints the id"),
            ("quorate put k v --lease \"$(quorate lease grant 60)\"", "a key that goes with it"),
        ],
    ),
    ("lease keep-alive", &[("quorate lease keep-alive 694d71ddacfda227", "until Ctrl-C")]),
    ("lease revoke", &[("quorate lease revoke 694d71ddacfda227", "its keys are deleted")]),
    ("lease list", &[("quorate lease list", "the ids of all")]),
    ("lease ttl", &[("quorate lease ttl 694d71ddacfda227 --keys", "what is left, and its keys")]),
    ("user add", &[("quorate user add alice", "asks for the password")]),
    ("user delete", &[("quorate user delete alice", "its tokens end")]),
    ("user get", &[("quorate user get alice", "its roles")]),
    ("user list", &[("quorate user list", "all of them")]),
    ("user passwd", &[("quorate user passwd alice", "asks for the new one")]),
    ("user grant-role", &[("quorate user grant-role alice readers", "she may do what it may")]),
    ("user revoke-role", &[("quorate user revoke-role alice readers", "and no more")]),
    ("role add", &[("quorate role add readers", "may do nothing yet")]),
    ("role delete", &[("quorate role delete readers", "also from its users")]),
    ("role get", &[("quorate role get readers", "what it may do")]),
    ("role list", &[("quorate role list", "all of them")]),
    (
        "role quota",
        &[(
            "quorate role quota readers --bytes 64MiB --keys 10000",
            "of what it may write; --requests-per-second for its users",
        )],
    ),
    ("role quotas", &[("quorate role quotas", "and what of them is used")]),
    ("role grant-permission", &[("quorate role grant-permission readers read app/ --prefix", "all keys below app/")]),
    (
        "role revoke-permission",
        &[("quorate role revoke-permission readers app/ --prefix", "the keys that it was given for")],
    ),
    ("auth enable", &[("quorate auth enable", "user root must be there")]),
    (
        "auth disable",
        &[("quorate auth disable --user root --password-file root.password", "everybody may do everything again")],
    ),
    ("auth status", &[("quorate auth status", "on or off")]),
    (
        "lock",
        &[
            ("quorate lock backup -- ./backup.sh", "one at a time in the whole cluster"),
            ("quorate lock backup", "held until Ctrl-C"),
        ],
    ),
    (
        "elect",
        &[
            ("quorate elect frontend \"$HOSTNAME\"", "lead until Ctrl-C"),
            ("quorate elect --listen frontend", "follow who leads"),
        ],
    ),
    ("cert ca", &[("quorate cert ca --dir certs", "a CA of one's own")]),
    ("cert server", &[("quorate cert server kv-0.example.org,10.0.0.1", "for a member's clients")]),
    ("cert client", &[("quorate cert client alice", "for a user")]),
    ("cert show", &[("quorate cert show kv-0.crt", "names, and when it ends")]),
    (
        "config",
        &[
            ("quorate config", "what is in force, and where it comes from"),
            ("quorate config --manual", "every setting, with its reason"),
        ],
    ),
    ("version", &[("quorate version", "of this program, and of the API")]),
    ("completion", &[("quorate completion bash", "for ~/.local/share/bash-completion/completions/quorate")]),
];

/// Gives each command its examples.
pub fn add(mut command: clap::Command) -> clap::Command {
    for (words, examples) in EXAMPLES {
        let words: Vec<&str> = words.split(' ').collect();
        if exists(&command, &words) {
            command = with(command, &words, &text(examples));
        }
    }
    command
}

fn exists(command: &clap::Command, words: &[&str]) -> bool {
    match words {
        [] => true,
        [first, rest @ ..] => command.find_subcommand(first).is_some_and(|inner| exists(inner, rest)),
    }
}

fn with(command: clap::Command, words: &[&str], text: &str) -> clap::Command {
    match words {
        [] => command.after_help(text.to_owned()),
        [first, rest @ ..] => command.mut_subcommand(*first, |inner| with(inner, rest, text)),
    }
}

fn text(examples: &[(&str, &str)]) -> String {
    let lines = examples.iter().map(|(line, what)| format!("\n  {line}\n      {what}"));
    format!("Examples:{}", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command;

    fn leaves(command: &clap::Command, path: &str, into: &mut Vec<String>) {
        let inner: Vec<_> = command.get_subcommands().filter(|inner| !inner.is_hide_set()).collect();
        if inner.is_empty() {
            into.push(path.to_owned());
        }
        for one in inner {
            leaves(one, format!("{path} {}", one.get_name()).trim(), into);
        }
    }

    #[test]
    fn every_command_has_examples() {
        let mut all = Vec::new();
        leaves(&command(), "", &mut all);
        let known: Vec<&str> = EXAMPLES.iter().map(|(words, _)| *words).collect();
        let without: Vec<&String> = all.iter().filter(|words| !known.contains(&&words[..])).collect();
        assert!(without.is_empty(), "without an example in this file: {without:?}");
    }

    #[test]
    fn every_example_parses() {
        // A program need not have every command.
        let all = EXAMPLES.iter().filter(|(words, _)| exists(&command(), &words.split(' ').collect::<Vec<_>>()));
        for (words, examples) in all {
            for (line, _) in *examples {
                assert!(line.starts_with(&format!("quorate {words}")) || line.contains("$("), "{line}");
                let line =
                    line.split(" < ").next().unwrap().replace("\"$(quorate lease grant 60)\"", "1f").replace('"', "");
                let parsed = command().try_get_matches_from(line.split(' '));
                assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
            }
        }
    }

    #[test]
    fn every_command_and_every_flag_is_described() {
        fn check(command: &clap::Command, path: &str) {
            assert!(command.get_about().is_some(), "{path} has no description");
            for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let positional = arg.is_positional();
                assert!(arg.get_help().is_some() || positional, "{path}: {} has no description", arg.get_id());
            }
            let inner = command.get_subcommands().filter(|inner| !inner.is_hide_set());
            inner.for_each(|inner| check(inner, &format!("{path} {}", inner.get_name())));
        }
        check(&command(), "quorate");
    }
}
