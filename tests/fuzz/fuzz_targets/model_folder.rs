#![no_main]

// Chat templates are rendered as the programs do it: by this program, in a child with limits.
libfuzzer_sys::fuzz_target!(
    init: if pacs_text::enter_renderer().is_some() {
        std::process::exit(0);
    },
    |bytes: &[u8]| pacs_fuzz::model_folder::check(bytes)
);
