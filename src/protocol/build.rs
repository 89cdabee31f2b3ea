//! Generates the messages of `src/agent.proto` and `src/cri.proto`, and the ttrpc bindings of the first.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> std::io::Result<()> {
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=src/agent.proto");
    println!("cargo::rerun-if-changed=src/cri.proto");
    Codegen::new()
        .inputs(["src/agent.proto", "src/cri.proto"])
        .include("src")
        .out_dir(&out)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generator lists the messages only; the bindings are a module beside them.
    std::fs::write(out.join("mod.rs"), "pub mod agent;\npub mod agent_ttrpc;\npub mod cri;\n")
}
