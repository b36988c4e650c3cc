#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pacs_fuzz::run_folder::check(bytes));
