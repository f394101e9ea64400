//! Compiles `proto/` with protox, so that building needs no protoc.

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        ["rpc.proto", "lock.proto", "election.proto", "admin.proto", "log.proto", "peer.proto", "backup.proto"],
        ["proto"],
    )?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("all.bin"), descriptors.encode_to_vec())?;
    // Server reflection shows clients their API, not the members'.
    let public = protox::compile(["rpc.proto", "lock.proto", "election.proto", "admin.proto"], ["proto"])?;
    std::fs::write(out.join("public.bin"), public.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::pb::codec::ExactCodec")
        .extern_path(".mvccpb.KeyValue", "crate::pb::KeyValue")
        .extern_path(".etcdserverpb.TxnRequest", "crate::pb::TxnRequest")
        .extern_path(".etcdserverpb.TxnResponse", "crate::pb::TxnResponse")
        .compile_fds(descriptors)?;
    // Members speak with a checksum; clients speak etcd's API as it is. The generator has one codec for all services.
    let peer = out.join("quorate.peer.v1.rs");
    let generated = std::fs::read_to_string(&peer)?;
    let checked = generated.replace("crate::pb::codec::ExactCodec", "crate::pb::checked::CheckedCodec");
    assert_ne!(generated, checked, "the peer service has a codec");
    std::fs::write(&peer, checked)?;
    Ok(())
}
