//! `txn`: comparisons, and what is done if all of them hold or if one does not, all at one revision.
//!
//! Owns the text form, which is that of etcd's own client: three blocks of lines, an empty line after each. It is read from a file, from a
//! pipe, or line by line from a person. Invariant: nothing is sent unless every line was understood.

use std::ffi::OsString;
use std::io::{BufRead, IsTerminal as _, Read as _};
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use clap::Parser as _;
use serde_json::{Value, json};

use super::client::ClientArgs;
use super::get::{Read, range_json};
use super::kv::{Delete, Write, connect, del_json, del_lines, put_json, put_lines};
use super::output::{Format, Lines, header_json, json_line};
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::{Compare, RequestOp, ResponseOp, TxnRequest, TxnResponse, request_op, response_op};

/// Most bytes of a transaction's text; every server refuses less.
const TEXT_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug, clap::Args)]
pub struct TxnArgs {
    /// Where the transaction stands; left out, or -: standard input, with prompts if that is a terminal
    file: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// A line of the second or third block.
#[derive(Debug, clap::Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_help_subcommand = true)]
enum Op {
    Get(Read),
    Put(Write),
    #[command(alias = "delete")]
    Del(Delete),
}

/// What a transaction was told to do, with how each answer is printed.
struct Txn {
    compares: Vec<Compare>,
    success: Vec<Op>,
    failure: Vec<Op>,
}

pub async fn txn(args: TxnArgs) -> anyhow::Result<Vec<u8>> {
    let txn = match args.file.as_deref().filter(|path| path.as_os_str() != "-") {
        Some(path) => {
            let text = crate::env::Env::real().disk.read(path).with_context(|| format!("{}", path.display()))?;
            read(&mut &text[..], false).with_context(|| format!("{}", path.display()))?
        }
        None => {
            let stdin = std::io::stdin();
            let asks = stdin.is_terminal();
            read(&mut std::io::BufReader::new(stdin.lock().take(TEXT_BYTES_MAX)), asks).context("standard input")?
        }
    };
    let request = txn.request()?;
    let mut client = connect(&args.client).await?;
    let answer = args.client.answer(client.txn(request)).await?.into_inner();
    Ok(format(args.output, &txn, &answer))
}

/// Reads the three blocks, from a person (`asks`) or not. An end of the text ends them all.
fn read(from: &mut dyn BufRead, asks: bool) -> anyhow::Result<Txn> {
    let mut number = 0;
    let mut block = |head: &str| -> anyhow::Result<Vec<(usize, Vec<u8>)>> {
        if asks {
            eprintln!("{head}");
        }
        let mut lines = Vec::new();
        loop {
            let mut line = Vec::new();
            if from.read_until(b'\n', &mut line)? == 0 {
                return Ok(lines);
            }
            number += 1;
            let line = line.trim_ascii().to_vec();
            if line.is_empty() {
                return Ok(lines);
            }
            lines.push((number, line));
        }
    };
    let compares = block("compares, such as mod(\"key\") > \"0\"; an empty line ends them:")?;
    let success = block("what to do if all hold (get, put, del):")?;
    let failure = block("what to do else (get, put, del):")?;
    // A person's third block is the end.
    let rest = if asks { Vec::new() } else { block("")? };
    if let Some((number, _)) = rest.first() {
        bail!("line {number}: expected nothing after the third block; an empty line ends a block");
    }
    let parsed = |lines: Vec<(usize, Vec<u8>)>| {
        let parse = |(number, line): (usize, Vec<u8>)| op(&line).map_err(|why| anyhow!("line {number}: {why}"));
        lines.into_iter().map(parse).collect::<anyhow::Result<Vec<Op>>>()
    };
    let compares = compares.into_iter().map(|(number, line)| {
        compare(&line).map_err(|why| anyhow!("line {number}: {}: {why}", String::from_utf8_lossy(&line)))
    });
    Ok(Txn { compares: compares.collect::<anyhow::Result<_>>()?, success: parsed(success)?, failure: parsed(failure)? })
}

impl Txn {
    fn request(&self) -> anyhow::Result<TxnRequest> {
        let ops = |ops: &[Op]| ops.iter().map(Op::request).collect::<anyhow::Result<Vec<_>>>();
        Ok(TxnRequest { compare: self.compares.clone(), success: ops(&self.success)?, failure: ops(&self.failure)? })
    }
}

impl Op {
    fn request(&self) -> anyhow::Result<RequestOp> {
        let no_value = || Err(anyhow!("a put in a transaction needs its value on the line"));
        let request = match self {
            Self::Get(read) => request_op::Request::RequestRange(read.request()),
            Self::Put(write) => request_op::Request::RequestPut(write.request(no_value)?),
            Self::Del(delete) => request_op::Request::RequestDeleteRange(delete.request()),
        };
        Ok(RequestOp { request: Some(request) })
    }
}

fn op(line: &[u8]) -> Result<Op, String> {
    let words = words(line)?;
    Op::try_parse_from(words).map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        format!("{first}; expected get, put or del as on the command line, such as put key value")
    })
}

/// Words as in a shell: apart by spaces, in quotes where they hold some.
fn words(line: &[u8]) -> Result<Vec<OsString>, String> {
    let mut words = Vec::new();
    let mut rest = line.trim_ascii_start();
    while let Some(first) = rest.first() {
        let word;
        (word, rest) = match first {
            b'"' => quoted(rest)?,
            b'\'' => {
                let end = rest[1..].iter().position(|byte| *byte == b'\'').ok_or("a quote ' is not closed")?;
                (rest[1..=end].to_vec(), &rest[end + 2..])
            }
            _ => {
                let end = rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
                (rest[..end].to_vec(), &rest[end..])
            }
        };
        if rest.first().is_some_and(|byte| !byte.is_ascii_whitespace()) {
            return Err("expected a space after a closing quote".to_owned());
        }
        words.push(OsString::from_vec(word));
        rest = rest.trim_ascii_start();
    }
    Ok(words)
}

/// A text in double quotes at the start of `line`, with the escapes of C and Go; and what follows.
fn quoted(line: &[u8]) -> Result<(Vec<u8>, &[u8]), String> {
    let mut rest = line.strip_prefix(b"\"").ok_or("expected a text in double quotes")?;
    let mut text = Vec::new();
    loop {
        let (first, after) = rest.split_first().ok_or("a double quote is not closed")?;
        rest = after;
        match first {
            b'"' => return Ok((text, rest)),
            b'\\' => {
                let (kind, after) = rest.split_first().ok_or("a double quote is not closed")?;
                rest = after;
                let mut number = |digits: usize| -> Result<u32, String> {
                    let found = rest.get(..digits).and_then(|digits| std::str::from_utf8(digits).ok());
                    let found = found.and_then(|digits| u32::from_str_radix(digits, 16).ok());
                    rest = rest.get(digits..).unwrap_or_default();
                    found.ok_or(format!("expected {digits} hexadecimal digits after \\{}", char::from(*kind)))
                };
                match kind {
                    b'n' => text.push(b'\n'),
                    b't' => text.push(b'\t'),
                    b'r' => text.push(b'\r'),
                    b'0' => text.push(0),
                    b'"' | b'\'' | b'\\' => text.push(*kind),
                    b'x' => text.push(number(2)? as u8),
                    b'u' => {
                        let c = char::from_u32(number(4)?).ok_or("\\u names no character")?;
                        text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                    }
                    other => return Err(format!("\\{} is no escape", char::from(*other))),
                }
            }
            byte => text.push(*byte),
        }
    }
}

/// `mod("key") > "5"`.
fn compare(line: &[u8]) -> Result<Compare, String> {
    const FORM: &str =
        "expected TARGET(\"key\") = \"operand\", with value, version, create, mod or lease, and =, !=, < or >";
    let paren = line.iter().position(|byte| *byte == b'(').ok_or(FORM)?;
    let (key, rest) = quoted(line[paren + 1..].trim_ascii_start())?;
    let rest = rest.trim_ascii_start().strip_prefix(b")").ok_or(FORM)?.trim_ascii();
    let (result, operand) = [
        (&b"!="[..], CompareResult::NotEqual),
        (&b"="[..], CompareResult::Equal),
        (&b"<"[..], CompareResult::Less),
        (&b">"[..], CompareResult::Greater),
    ]
    .into_iter()
    .find_map(|(sign, result)| Some((result, rest.strip_prefix(sign)?.trim_ascii_start())))
    .ok_or(FORM)?;
    let operand = match operand.first() {
        None => return Err(FORM.to_owned()),
        Some(b'"') => {
            let (text, rest) = quoted(operand)?;
            if !rest.is_empty() {
                return Err(FORM.to_owned());
            }
            text
        }
        Some(_) => operand.to_vec(),
    };
    let number = || {
        let text = String::from_utf8_lossy(&operand);
        text.parse::<i64>().map_err(|_| format!("got {text:?}, expected a number"))
    };
    let (target, union) = match line[..paren].trim_ascii() {
        b"val" | b"value" => (CompareTarget::Value, TargetUnion::Value(Bytes::from(operand))),
        b"ver" | b"version" => (CompareTarget::Version, TargetUnion::Version(number()?)),
        b"c" | b"create" => (CompareTarget::Create, TargetUnion::CreateRevision(number()?)),
        b"m" | b"mod" => (CompareTarget::Mod, TargetUnion::ModRevision(number()?)),
        b"lease" => {
            let id = super::lease::parse_id(&String::from_utf8_lossy(&operand));
            // 0: no lease.
            let id = if operand == b"0" { 0 } else { id? };
            (CompareTarget::Lease, TargetUnion::Lease(id))
        }
        _ => return Err(FORM.to_owned()),
    };
    Ok(Compare {
        result: result.into(),
        target: target.into(),
        key: key.into(),
        target_union: Some(union),
        ..Compare::default()
    })
}

fn format(form: Format, txn: &Txn, answer: &TxnResponse) -> Vec<u8> {
    if form == Format::Json {
        return json_line(&json!({
            "header": header_json(answer.header.as_ref()),
            "succeeded": answer.succeeded,
            "responses": answer.responses.iter().map(response_json).collect::<Vec<_>>(),
        }));
    }
    let mut lines = Lines::new(false);
    lines.text(if answer.succeeded { "SUCCESS" } else { "FAILURE" });
    let done = if answer.succeeded { &txn.success } else { &txn.failure };
    for (op, response) in done.iter().zip(&answer.responses) {
        lines.text("");
        match (op, &response.response) {
            (Op::Get(read), Some(response_op::Response::ResponseRange(range))) => read.lines(&mut lines, range),
            (_, Some(response_op::Response::ResponsePut(put))) => put_lines(&mut lines, put),
            (_, Some(response_op::Response::ResponseDeleteRange(deleted))) => del_lines(&mut lines, deleted),
            _ => {}
        }
    }
    lines.finish()
}

fn response_json(response: &ResponseOp) -> Value {
    match &response.response {
        Some(response_op::Response::ResponseRange(range)) => json!({ "response_range": range_json(range) }),
        Some(response_op::Response::ResponsePut(put)) => json!({ "response_put": put_json(put) }),
        Some(response_op::Response::ResponseDeleteRange(gone)) => json!({ "response_delete_range": del_json(gone) }),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<TxnRequest> {
        read(&mut text.as_bytes(), false)?.request()
    }

    #[test]
    fn three_blocks_become_a_request() {
        let text = "value(\"a b\") = \"1\\x00\"\nmod(\"k\") > 5\nlease(\"k\") != \"1f\"\n\nput k \"a b\" --lease=1f\nget p --prefix --limit 3\n\ndel k\n";
        let request = parse(text).unwrap();
        let targets: Vec<_> = request.compare.iter().map(|compare| compare.target_union.clone().unwrap()).collect();
        let expected = [TargetUnion::Value(b"1\0"[..].into()), TargetUnion::ModRevision(5), TargetUnion::Lease(31)];
        assert_eq!((targets, &request.compare[0].key[..]), (expected.to_vec(), &b"a b"[..]));
        assert_eq!((request.success.len(), request.failure.len()), (2, 1));
        let Some(request_op::Request::RequestPut(put)) = &request.success[0].request else { panic!() };
        assert_eq!((&put.value[..], put.lease), (&b"a b"[..], 31));
        assert_eq!(parse("").unwrap(), TxnRequest::default());
        assert_eq!(parse("\n\n").unwrap(), TxnRequest::default());
    }

    #[test]
    fn every_line_must_be_understood() {
        for (text, part) in [
            ("value(k) = 1", "line 1"),
            ("value(\"k\")", "expected TARGET"),
            ("mod(\"k\") = x", "expected a number"),
            ("size(\"k\") = 1", "expected TARGET"),
            ("\nput k", "needs its value"),
            ("\nputt k v", "line 2"),
            ("\nget", "line 2"),
            ("\nput k \"v", "not closed"),
            ("\nput k 'v'w", "a space"),
            ("\nput k \"\\q\"", "no escape"),
            ("\n\n\nput k v", "third block"),
        ] {
            let error = format!("{:#}", parse(text).err().unwrap_or_else(|| panic!("{text:?} is taken")));
            assert!(error.contains(part) && !error.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn words_keep_bytes_and_spaces() {
        let found = words(b"put  'a \"b' \"c\\t\\u00fc\\xff\" d").unwrap();
        let expected: [&[u8]; 4] = [b"put", b"a \"b", b"c\t\xc3\xbc\xff", b"d"];
        assert_eq!(found.into_iter().map(OsString::into_vec).collect::<Vec<_>>(), expected);
    }
}
