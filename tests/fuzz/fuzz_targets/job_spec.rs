#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pacs_fuzz::job_spec::check(bytes));
